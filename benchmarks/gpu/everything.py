"""Everything that is to be done with a GPU, in one command."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.peers.beside import ADAPTERS, Work, run_worker
from benchmarks.runner import Calls
from benchmarks.shared.engines import random_adapters
from benchmarks.shared.shapes import SHAPES, random_model

ROOT = Path(__file__).parents[2]
GPU_TESTS = (
    "tests/kernels/test_lora_ops.py",
    "tests/kernels/test_triton_ops.py",
    "tests/kernels/test_layer_ops.py",
    "tests/kernels/test_triton_order.py",
    "tests/kernels/test_triton_attention.py",
    "tests/kernels/test_expert_ops.py",
    "tests/kernels/test_played_steps.py",
    "tests/kernels/test_triton_blocks.py",
    "tests/kernels/test_float8_cache.py",
    "tests/model/test_waiting.py",
    "tests/model/test_slot_stream.py",
    "tests/model/test_parallel.py",
)
"""Files with tests that run on a GPU where there is one."""
HOME = Path("build/gpu")
STEP = ("kernels", "step", "--device", "cuda", "--rounds", "20", "--adapters", "0", "1", "8", "32")
PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "decode steps": ((*STEP, "--sequences", "1", "8", "32", "64", "--contexts", "1000", "4000"), 120),
    "decode steps, rank 64": ((*STEP, "--sequences", "32", "--contexts", "1000", "--ranks", "64"), 60),
    "launched steps": ((*STEP, "--sequences", "1", "32", "--contexts", "1000", "--no-played"), 60),
    "prompts": ((*STEP, "--sequences", "1", "--contexts", "0", "--tokens", "512", "2048", "8192"), 60),
    "quantized": ((*STEP, "--sequences", "1", "32", "--quantizations", "none", "int8", "fp8", "int4"), 90),
    "fp8 cache": ((*STEP, "--sequences", "32", "--contexts", "4000", "--caches", "auto", "fp8"), 60),
    "engine": (("gpu", "engine"), 75),
    "vllm": (("gpu", "engine", "--worker", "vllm"), 120),
    "tests": (("-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *GPU_TESTS), 150),
}
"""Commands, and the most seconds that each may take; the most important first."""


def everything(
    *,
    parts: tuple[str, ...] = tuple(PARTS),
    layers: int = 8,
    minutes: float = 9.0,
    write: Path = HOME / "report.md",
) -> Iterator[str]:
    """Steps, prompts, quantized weights, caches, an engine, and the tests that need a GPU.

    No downloads: random weights in Llama 3 8B's shapes. Each part is a process of its own with a limit of
    time, since a GPU that a kernel has brought down is lost for its process; what it had printed until then
    is kept. The page is written again after each part.
    """
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was checked or measured")
    model = str(random_model(HOME, "llama-8b", layers))
    write.parent.mkdir(parents=True, exist_ok=True)
    write.write_text(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}\n\n", encoding="utf-8")
    end = time.monotonic() + 60 * minutes
    for part in parts:
        arguments, most = PARTS[part]
        left = min(most, end - time.monotonic())
        command = (sys.executable, *(() if arguments[0] == "-m" else ("-m", "benchmarks")), *arguments)
        command += ("--model", model) if "step" in arguments else ()
        if part == "vllm" and importlib.util.find_spec("vllm") is None:
            said = "not run: vLLM is not installed"
        else:
            said = run_part(command, left) if left > 10 else "not run: the time is over"
        with write.open("a", encoding="utf-8") as page:
            page.write(f"## {part}\n\n{said}\n")
        yield f"## {part}\n\n{said}"
    yield f"all of it is in {write}"


def run_part(command: tuple[str, ...], seconds: float) -> str:
    """Return what a command prints, for up to so many seconds, and how it ended if not well."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env=environment,
        )
        try:
            code = process.wait(seconds)
            ended = f"**It ended with {code}.**\n" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"**It was ended after {seconds:.0f} s, its limit.**\n"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return f"{output.read()}\n{ended}"


def engine(
    *, worker: str = "aioengine", shapes: str = "llama-8b", layers: int = 8, home: Path = HOME
) -> Iterator[Calls]:
    """This engine, or vLLM (``--worker vllm``), on random weights, with 8 adapters of rank 16 and without."""
    model = random_model(home, shapes, layers)
    settings: dict[str, object] = {"quantization": "none", "lora_dtype": "auto", "kv_cache_memory": None}
    given = settings if worker == "aioengine" else {"skip_tokenizer_init": True}
    with random_adapters(str(model), ADAPTERS) as adapters:

        def visit(used: int) -> dict[str, float]:
            works = [Work(*size, used) for size in ((1, 128, 64), (32, 128, 64), (64, 512, 128))]
            log, vocabulary = home.absolute() / f"{worker}.log", SHAPES[shapes].vocab_size
            paths = [*adapters.values()]
            return run_worker(worker, Path(sys.executable), model, given, paths, works, vocabulary, log)[0]

        calls = {"base": lambda: visit(0), f"{ADAPTERS} adapters": lambda: visit(ADAPTERS)}
        yield Calls(f"{worker}, {layers} layers of random weights", calls, 1, warm_up=0)


CASES = (everything, engine)
