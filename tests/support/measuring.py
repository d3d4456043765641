"""``benchmarks.kernels.gpu`` on a GPU made of CPU memory, which computes Triton's kernels in its interpreter.

A script, because the interpreter is chosen when triton is imported. Its argument is a JSON array of runs.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

NAME = "NVIDIA H100 80GB HBM3"
LIMITS = {"shared_memory_per_block": 48 * 1024, "shared_memory_per_block_optin": 227 * 1024, "warp_size": 32}
TESTS = Path(__file__).parents[1]
CHECKED = ((0, 1), (60, 1), (0, 18), (5, 2))
"""Sequences beside the oracle: one beyond its window, and one of more than a tile."""
OPTIONS = [
    *("--shapes", "tiny", "--layers", "1", "--tokens", "1", "18", "--adapters", "1", "3", "--ranks", "8"),
    *("--contexts", "20", "--step-ranks", "8", "--batches", "1", "3", "--prompts", "17"),
]
"""Of ``benchmarks.kernels.gpu``, so that it ends after seconds here."""


class Run(NamedTuple):
    """What one call of the program does."""

    arguments: Sequence[str]
    fail: str = ""
    """An operation that fails, and how: "expand" by a RuntimeError, "expand:fault" as a GPU with an illegal
    address."""


class Ended(NamedTuple):
    """What it has returned and printed."""

    code: int
    printed: str


def run(*runs: Run) -> list[Ended]:
    """Run the program so often, one call after the other in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(runs)],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [Ended(*each) for each in json.loads(done.stdout)]


def main() -> None:
    import torch
    from support.quick_interpreter import quicken

    quicken()
    torch.set_num_threads(1)
    found = []
    for each in json.loads(sys.argv[1]):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = _measure(Run(*each))
        found.append(Ended(code, printed.getvalue()))
    print(json.dumps(found))


def _measure(run: Run) -> int:
    import torch
    import triton.testing
    from support.fake_cuda import FakeCuda

    from benchmarks.kernels import gpu, gpu_machine, gpu_steps

    signature, generator = inspect.signature(triton.testing.do_bench), torch.Generator

    def bench(function: Callable[[], object], **options: Any) -> float:
        signature.bind(function, **options)
        function()
        return 0.5

    with FakeCuda() as world:
        cuda = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: NAME,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_properties": lambda device=None: SimpleNamespace(**LIMITS),
            "synchronize": lambda device=None: world.stream.synchronize(),
        }
        world.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        world.enter_context(mock.patch.object(torch, "Generator", side_effect=lambda device: generator()))
        world.enter_context(mock.patch.object(triton.testing, "do_bench", bench))
        world.enter_context(mock.patch.object(gpu_machine, "REPEATS", 1))
        world.enter_context(mock.patch.multiple(gpu_steps, CHECKED=CHECKED, BESIDE=3))
        # A graph computes again what was recorded.
        world.enter_context(mock.patch.object(gpu_steps, "CudaGraphs", return_value=lambda step: step))
        if run.fail:
            _break(world, run.fail, gpu)
        return gpu.main(run.arguments)


def _break(world: Any, fail: str, gpu: ModuleType) -> None:
    from aioengine.kernels.triton import backend

    name, _, how = fail.partition(":")
    message = "CUDA error: an illegal memory access was encountered" if how == "fault" else "it does not work"

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    for module in (backend, gpu.lora):
        if hasattr(module, name):
            world.enter_context(mock.patch.object(module, name, broken))


if __name__ == "__main__":
    main()
