"""``benchmarks.kernels.gpu`` on a GPU made of CPU memory, which computes Triton's kernels in its interpreter.

A script, because the interpreter is chosen when triton is imported. The first argument names an operation
that fails, and how: "expand" by a RuntimeError, "expand:fault" as a GPU with an illegal address. "-": none.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

NAME = "NVIDIA H100 80GB HBM3"
TESTS = Path(__file__).parents[1]
OPTIONS = [
    *("--shapes", "tiny", "--layers", "2", "--tokens", "1", "5", "--adapters", "1", "3", "--ranks", "8"),
    *("--contexts", "20", "--step-ranks", "8", "--batches", "1", "3", "--prompts", "17"),
]
"""Of ``benchmarks.kernels.gpu``, so that it ends after seconds here."""


def run(arguments: Sequence[str], fail: str = "-") -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, __file__, fail, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )


def main() -> int:
    import torch
    import triton.testing
    from support.fake_cuda import FakeCuda
    from support.quick_interpreter import quicken

    from benchmarks.kernels import gpu, gpu_machine, gpu_steps

    fail, *arguments = sys.argv[1:]
    quicken()
    torch.set_num_threads(1)
    signature, generator = inspect.signature(triton.testing.do_bench), torch.Generator

    def bench(function: Callable[[], object], **options: Any) -> float:
        signature.bind(function, **options)
        function()
        return 0.5

    with FakeCuda() as world:
        cuda = {
            "is_available": lambda: True,
            "get_device_name": lambda device=None: NAME,
            "synchronize": lambda device=None: world.stream.synchronize(),
        }
        world.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        world.enter_context(mock.patch.object(torch, "Generator", side_effect=lambda device: generator()))
        world.enter_context(mock.patch.object(triton.testing, "do_bench", bench))
        world.enter_context(mock.patch.object(gpu_machine, "REPEATS", 1))
        # A graph computes again what was recorded.
        world.enter_context(mock.patch.object(gpu_steps, "CudaGraphs", return_value=lambda step: step))
        if fail != "-":
            _break(world, fail, gpu)
        return gpu.main(arguments)


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
    sys.exit(main())
