"""Everything that is to be done with a GPU, in one command and under 9 minutes, without downloads.

    python -m benchmarks.gpu --write gpu.md
    python -m benchmarks.gpu --only checks "steps 1000 16" engine
    python -m benchmarks.gpu --minutes 4

Checks every operation, measures steps, prompts, products and launches beside what docs/gpu-predictions.md
predicts, runs the tests that need a GPU, and the engine on random weights in Llama 3 8B's shapes, with vLLM
beside it if that is installed. What matters most comes first. Each part is a process of its own with a limit
of time, since a GPU that a kernel has brought down is lost for its process; what it had measured until then
is kept. The Markdown file is written again after each part.

Exits with 1 if a check, test or measurement failed, and with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels.sheets import Entry, markdown, read_entries

ROOT = Path(__file__).resolve().parents[1]
KERNELS = (sys.executable, "-m", "benchmarks.kernels.gpu", "--json")
GPU_TESTS = (
    "tests/kernels/test_triton_ops.py",
    "tests/kernels/test_layer_ops.py",
    "tests/kernels/test_triton_order.py",
    "tests/kernels/test_triton_attention.py",
    "tests/kernels/test_expert_ops.py",
    "tests/kernels/test_played_steps.py",
    "tests/kernels/test_triton_blocks.py",
    "tests/kernels/test_triton_eight_bits.py",
    "tests/kernels/test_float8_cache.py",
    "tests/model/test_waiting.py",
    "tests/model/test_slot_stream.py",
    "tests/model/test_parallel.py",
)
"""Files with tests that run on a GPU where there is one."""
GRACE = 10.0
"""Seconds between the end of a part's time, at which it begins no further row, and its being killed."""


class Part(NamedTuple):
    """Work of one process."""

    name: str
    command: Sequence[str]
    seconds: float
    """Most that it may take."""
    read: Callable[[str], list[Entry]] = read_entries
    """Returns the entries in what it has printed."""
    missing: str = ""
    """Why it cannot run; nothing if it can."""


class Outcome(NamedTuple):
    """Results of a part."""

    part: Part
    entries: list[Entry]
    note: str
    """Why it did not run, or not to its end; nothing if it did."""
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether something is wrong, and not only left out."""
        ended = bool(self.note) and not self.part.missing and not self.note.startswith("not run")
        return ended or any("error" in entry for entry in self.entries)


def parts(options: Sequence[str] = (), kernels: Sequence[str] = KERNELS) -> list[Part]:
    """Return everything that can be done, the most important first. ``options`` go to all measurements of
    kernels and steps."""

    def measure(name: str, seconds: float, *arguments: str) -> Part:
        part = name.split()[0]
        command = (*kernels, "--parts", part, *options, *arguments, "--seconds", f"{seconds - GRACE:.0f}")
        return Part(name, command, seconds)

    engine = (sys.executable, "-m", "benchmarks.gpu_engines")
    vllm = "" if importlib.util.find_spec("vllm") is not None else "vLLM is not installed"
    tests = (sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *GPU_TESTS)
    found = [measure("checks", 100, "--ranks", "8", "64")]
    for context, rank in ((1000, 16), (1000, 64), (4000, 16)):
        name = f"steps {context} {rank}"
        found.append(measure(name, 60, "--contexts", str(context), "--step-ranks", str(rank)))
    return [
        *found,
        measure("prompts", 40),
        measure("products", 40),
        Part("engine", (*engine, "aioengine", "--seconds", "65"), 75),
        Part("vllm", (*engine, "vllm", "--seconds", "110"), 120, missing=vllm),
        measure("layer", 50),
        measure("linears", 80),
        Part("tests", tests, 100, summary_of_tests),
    ]


def summary_of_tests(text: str) -> list[Entry]:
    """Return what pytest has printed as a table, also if it did not come to its end."""
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|RERUN)\b", text, re.MULTILINE)
    counts = Counter(outcome.lower() for _, outcome in found)
    entries: list[Entry] = [{"title": "Tests that need a GPU", "columns": ["outcome", "tests"]}]
    entries += [{"cells": [outcome, str(count)]} for outcome, count in sorted(counts.items())]
    return entries + [{"error": name} for name, outcome in found if outcome in ("FAILED", "ERROR")]


def run_part(part: Part, seconds: float, log: Path) -> Outcome:
    """Run a part for up to so many seconds. Its messages go to ``log``."""
    if part.missing:
        return Outcome(part, [], f"not run: {part.missing}", 0.0)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, log.open("w", encoding="utf-8") as errors:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            part.command, stdout=output, stderr=errors, cwd=ROOT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        note = ""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            note = f"ended after {seconds:.0f} s, its limit"
        finally:
            _kill(process)
        if not note and code not in (0, 1):
            note = f"ended with {code}: {_last_line(log)}"
        output.seek(0)
        entries = part.read(output.read())
        if not note and code == 1 and not any("error" in entry for entry in entries):
            note = f"failed: {_last_line(log)}"
    return Outcome(part, entries, note, time.monotonic() - began)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started; does nothing if they have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1][:300] if lines else 'it said nothing'} (more in {log})"


def run_all(
    chosen: Sequence[Part], seconds: float, logs: Path, clock: Callable[[], float] = time.monotonic
) -> Iterator[Outcome]:
    """Run the parts one after the other, and yield what each found. Parts for which too little of
    ``seconds`` is left do not run."""
    end = clock() + seconds
    for part in chosen:
        left = end - clock()
        if left < min(part.seconds, 2 * GRACE) and not part.missing:
            yield Outcome(part, [], "not run: the time is over", 0.0)
        else:
            log = logs / f"{part.name.replace(' ', '-')}.log"
            yield run_part(part, min(part.seconds, left), log)


def report(title: str, outcomes: Sequence[Outcome], to_come: Sequence[Part] = ()) -> str:
    """Return the Markdown page."""
    lines = [f"# {title}", "", "| part | seconds | outcome |", "|---|---|---|"]
    for outcome in outcomes:
        said = outcome.note or ("something failed, see below" if outcome.failed else "complete")
        lines.append(f"| {outcome.part.name} | {outcome.seconds:.0f} | {said.replace('|', ' ')} |")
    lines += [f"| {part.name} | | to come |" for part in to_come]
    lines += ["", "Ratios are measured to predicted; those above 1.3 are bold.", ""]
    for outcome in outcomes:
        lines += markdown(outcome.entries)
    return "\n".join(lines).rstrip() + "\n"


def machine_title() -> str:
    """Return what was measured: the GPU, its driver, and versions, without using the GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        gpu = said.splitlines()[0].replace(", ", ", driver ")
    except (OSError, subprocess.SubprocessError, IndexError):
        gpu = "a GPU that nvidia-smi does not name"
    found = [gpu]
    for name in ("torch", "triton"):
        version = importlib.metadata.version(name) if importlib.util.find_spec(name) else "none"
        found.append(f"{name} {version}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, and write the page after each. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = parts()
    parser.add_argument("--only", nargs="+", choices=[part.name for part in every], help="these parts")
    parser.add_argument("--minutes", type=float, default=9.0, help="after them no part begins")
    parser.add_argument("--write", type=Path, default=Path("build/gpu/report.md"), help="the Markdown file")
    args = parser.parse_args(argv)
    chosen = [part for part in every if args.only is None or part.name in args.only]
    return conduct(chosen, 60 * args.minutes, args.write, machine_title())


def conduct(chosen: Sequence[Part], seconds: float, page: Path, title: str) -> int:
    """Run the parts, and write the page after each. Returns the exit code."""
    page.parent.mkdir(parents=True, exist_ok=True)
    found: list[Outcome] = []
    for outcome in run_all(chosen, seconds, page.parent):
        found.append(outcome)
        page.write_text(report(title, found, chosen[len(found) :]), encoding="utf-8")
        said = outcome.note or ("something failed" if outcome.failed else "complete")
        print(f"{outcome.part.name}: {said}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        if outcome.note.startswith("ended with 2: no CUDA device"):
            return 2
    print(page.read_text(encoding="utf-8"), end="")
    return int(any(outcome.failed for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
