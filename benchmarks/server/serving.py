"""Cost of the server: the same load through `aioengine serve` and on the embedded engine, in turns.

The client is aiperf (https://github.com/ai-dynamo/aiperf), in an environment of its own:

    python -m venv aiperf && aiperf/bin/pip install aiperf
    python -m benchmarks.server.serving --client aiperf/bin/aiperf [--rounds 3]

64 requests at once, 128 prompt tokens and 64 greedy output tokens each, streamed; request i uses adapter i %
8 of 8 random rank-16 adapters. Each round starts a server, then a process that embeds the engine. Prefix
caching is off. The client runs on the same machine. So that it does not take processor time from the model,
the engine has half of the cores, and the client has the others (--engine-cores; with 0 they share all). CPU
seconds are those between the first request and the last answer. Prints; asserts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
from tokenizers import Tokenizer

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.shared.engines import write_adapters

START_SECONDS = 120
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Load:
    """``prompts`` are sent by ``concurrency`` users, each waiting for its answer before it sends another."""

    model: str
    rank: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    adapters: dict[str, Path]
    prompts: list[str]

    @property
    def kv_cache_memory(self) -> str:
        return "1GiB"


@dataclass(frozen=True)
class Result:
    """Results of one round; CPU seconds are those spent during the load."""

    rate: float
    """Output tokens per second."""
    seconds: float
    engine_cpu: float
    """CPU seconds of the server, or of the process that embeds the engine."""
    loop_cpu: float
    """CPU seconds of that process's event loop, where the model never runs."""
    client_cpu: float = 0.0


def make_load(args: argparse.Namespace, folder: Path) -> Load:
    """Write the adapters to ``folder``, and draw prompts of words with exactly ``prompt_tokens`` tokens."""
    path = resolve_model(args.model)
    spec = read_spec(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    decoded = (tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size()))
    words = [word for word in decoded if re.fullmatch(r" [a-z]{2,}", word)]
    rng = random.Random(0)
    prompts: list[str] = []
    while len(prompts) < args.requests:
        text = "".join(rng.choices(words, k=args.prompt_tokens))
        if len(tokenizer.encode(text).ids) == args.prompt_tokens:
            prompts.append(text)
    adapters = write_adapters(folder, spec, args.adapters, args.rank)
    return Load(
        args.model, args.rank, args.concurrency, args.prompt_tokens, args.output_tokens, adapters, prompts
    )


@contextlib.contextmanager
def on(cores: set[int]) -> Iterator[None]:
    """Run processes that are started meanwhile on these cores only (on Linux; elsewhere on all)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# Embedded


def embedded(load: Load) -> Result:
    """Run the load on an engine of this process."""
    return asyncio.run(_embedded(load))


async def _embedded(load: Load) -> Result:
    config = EngineConfig(
        model=load.model,
        max_model_len=load.prompt_tokens + load.output_tokens,
        max_num_seqs=load.concurrency,
        kv_cache_memory=load.kv_cache_memory,
        enable_prefix_caching=False,  # every run computes every prompt
        lora=LoRAConfig(max_loras=len(load.adapters), max_lora_rank=load.rank),
    )
    names = list(load.adapters)
    params = SamplingParams(max_tokens=load.output_tokens, temperature=0.0, ignore_eos=True)
    waiting = iter(enumerate(load.prompts))

    async def user(engine: AsyncEngine) -> None:
        for index, prompt in waiting:
            async for output in engine.generate(prompt, params, adapter=names[index % len(names)]):
                last = output
            assert len(last.token_ids) == load.output_tokens

    async with AsyncEngine(config) as engine:
        for name, path in load.adapters.items():
            await engine.load_adapter(name, path)
        warm_up = SamplingParams(max_tokens=2, ignore_eos=True)
        await asyncio.gather(*(engine.complete("Hello", warm_up, adapter=name) for name in names))
        start, cpu, loop_cpu = time.perf_counter(), time.process_time(), time.thread_time()
        await asyncio.gather(*(user(engine) for _ in range(load.concurrency)))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        loop_cpu = time.thread_time() - loop_cpu
    return Result(len(load.prompts) * load.output_tokens / seconds, seconds, cpu, loop_cpu)


# Served


@contextlib.contextmanager
def server(load: Load, folder: Path, cores: set[int]) -> Iterator[tuple[str, int]]:
    """Run a server with the load's adapters in its slots; yields its URL and process id."""
    command = [sys.executable, "-m", "aioengine", "serve", "--port", "0", "--model", load.model]
    command += ["--max-model-len", str(load.prompt_tokens + load.output_tokens)]
    command += ["--max-num-seqs", str(load.concurrency), "--no-enable-prefix-caching"]
    command += ["--max-loras", str(len(load.adapters)), "--max-lora-rank", str(load.rank)]
    command += ["--kv-cache-memory", load.kv_cache_memory]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in load.adapters.items())]
    log = folder / "server.log"
    with log.open("wb") as file, on(cores):
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        url = _url(process, log)
        for name in load.adapters:
            body = json.dumps({"model": name, "prompt": "Hello", "max_tokens": 2, "ignore_eos": True})
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", body.encode(), headers)
            urllib.request.urlopen(request, timeout=START_SECONDS).close()
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return where the server listens, once it says so. Raises SystemExit with its log if it does not."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if found := re.search(r"serving at (http://[\w.:]+)", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


class CpuSampler:
    """CPU seconds over time of a process, of its first thread, and of the process with its children."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._samples: list[tuple[float, float, float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> CpuSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def between(self, start: float, end: float) -> tuple[float, float]:
        """Return the CPU seconds between two times of ``time.time()``, as precise as the samples: all, first
        thread."""
        inside = [sample for sample in self._samples if start - SAMPLE_SECONDS <= sample[0] <= end]
        return (inside[-1][1] - inside[0][1], inside[-1][2] - inside[0][2]) if inside else (0.0, 0.0)

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            with contextlib.suppress(psutil.NoSuchProcess):
                processes = [self._root, *self._root.children(recursive=True)]
                used = sum(sum(process.cpu_times()[:2]) for process in processes)
                first = sum(
                    t.user_time + t.system_time for t in self._root.threads() if t.id == self._root.pid
                )
                self._samples.append((time.time(), used, first))


def served(load: Load, client: str, folder: Path, engine_cores: set[int], client_cores: set[int]) -> Result:
    """Run the load through a server, from a client process."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"text": text, "output_length": load.output_tokens}) + "\n" for text in load.prompts
        )
    )
    with server(load, folder, engine_cores) as (url, server_pid), on(client_cores):
        command = [client, "profile", "--url", url, "--endpoint-type", "completions", "--streaming"]
        command += ["--model-names", ",".join(load.adapters), "--model-selection-strategy", "round-robin"]
        command += ["--tokenizer", str(resolve_model(load.model)), "--use-server-token-count"]
        command += ["--input-file", str(prompts), "--custom-dataset-type", "single_turn"]
        command += ["--dataset-sampling-strategy", "sequential", "--use-legacy-max-tokens"]
        command += ["--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"]
        command += ["--concurrency", str(load.concurrency), "--request-count", str(len(load.prompts))]
        command += ["--workers-max", "1", "--record-processor-service-count", "1"]
        command += ["--no-server-metrics", "--no-gpu-telemetry", "--ui", "none"]
        command += ["--export-level", "summary", "--output-artifact-dir", str(folder / "aiperf")]
        with (folder / "client.log").open("w+b") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            with CpuSampler(server_pid) as server_cpu, CpuSampler(process.pid) as client_cpu:
                code = process.wait()
            log.seek(0)
            if code:
                raise SystemExit(f"{client} failed with exit code {code}:\n{log.read().decode()}")
    report = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
    tokens = report.get("total_output_tokens", {}).get("avg", 0)  # absent if every request failed
    expected = len(load.prompts) * load.output_tokens
    if tokens != expected:
        raise SystemExit(f"{tokens:.0f} output tokens instead of {expected}: {report['error_summary']}")
    start, end = (datetime.fromisoformat(report[key]).timestamp() for key in ("start_time", "end_time"))
    server_all, server_loop = server_cpu.between(start, end)
    client_all, _ = client_cpu.between(start, end)
    return Result(tokens / (end - start), end - start, server_all, server_loop, client_all)


# Report


def print_summary(results: Sequence[tuple[Result, Result]], *, shared: bool) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    median = statistics.median
    rate = median(through.rate for through, _ in results)
    embedded_rate = median(inside.rate for _, inside in results)
    share = median(through.client_cpu / (through.seconds * cores) for through, _ in results)
    print(f"median: served {rate:.1f} tok/s, embedded {embedded_rate:.1f}: {rate / embedded_rate:.1%}")
    if shared:
        print(
            f"The client took {share:.1%} of {cores} cores. Had the server had them too, it would be at "
            f"{rate / embedded_rate / (1 - share):.1%} (an estimate)."
        )
    # The model's threads spin while they wait for each other, so the whole process's CPU time says little.
    for what, results_of in (("server", [r for r, _ in results]), ("embedded", [r for _, r in results])):
        loop = median(result.loop_cpu / (result.rate * result.seconds) for result in results_of)
        share = median(result.loop_cpu / result.seconds for result in results_of)
        cpu = median(result.engine_cpu for result in results_of)
        print(
            f"{what}: event loop {loop * 1e6:.0f} us an output token, {share:.1%} of a core; "
            f"whole process {cpu:.1f} CPU s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--client", default="aiperf", help="path of aiperf")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--engine-cores", type=int, help="the client has the others; 0: they share all")
    args = parser.parse_args()
    client = shutil.which(args.client)
    if client is None:
        raise SystemExit(
            f"{args.client}: no such program; install it in an environment of its own with "
            "`python -m venv aiperf && aiperf/bin/pip install aiperf` and give --client aiperf/bin/aiperf"
        )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = len(cores) // 2 if args.engine_cores is None else args.engine_cores
    engine_cores, client_cores = set(cores[:share] or cores), set(cores[share:] or cores)
    results = []
    with tempfile.TemporaryDirectory() as name:
        load = make_load(args, Path(name) / "adapters")
        for number in range(1, args.rounds + 1):
            folder = Path(name) / f"round-{number}"
            folder.mkdir()
            through = served(load, client, folder, engine_cores, client_cores)
            # A new process, as the server's is: no allocator that is warm, no threads of other engines.
            with (
                on(engine_cores),
                ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
            ):
                inside = pool.submit(embedded, load).result()
            results.append((through, inside))
            print(
                f"round {number}: served {through.rate:.1f} tok/s (server {through.engine_cpu:.1f} CPU s, "
                f"client {through.client_cpu:.1f} CPU s), embedded {inside.rate:.1f} tok/s "
                f"({inside.engine_cpu:.1f} CPU s)",
                flush=True,
            )
    print_summary(results, shared=engine_cores == client_cores)


if __name__ == "__main__":
    main()
