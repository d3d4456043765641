"""A GPU that computes nothing: Triton's launches are recorded, and tensors have no data.

``install`` replaces Triton's compiler and driver for the rest of the process, so it belongs into a process of
its own (``run_on_fake_gpu``). Tensors are on torch's "meta" device: torch checks shapes, strides and devices,
and reading a value on the host fails.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from support.preloaded import CONTEXT

GRID_LIMITS = (2**31, 2**16, 2**16)
"""A launch's programs by dimension are fewer than these."""


class FakeGpu:
    """What was launched since :func:`install`."""

    def __init__(self) -> None:
        self.variants: dict[str, int] = {}
        """Compiled kernels by JIT key, in order: the number of the step that needed each."""
        self.faults: list[str] = []
        """Arguments on another device, and grids that no GPU takes."""
        self.step = -1

    def reset(self) -> None:
        """Forget launches and faults, but not what is compiled."""
        self.faults = []

    def compiled(self, source: Any) -> None:
        key = (source.fn.__name__, source.constants, source.signature, source.attrs)
        self.variants.setdefault(repr(key), self.step)

    def launched(self, name: str, grid: Sequence[int], arguments: Sequence[object]) -> None:
        for value in arguments:
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.faults.append(f"{name}: a tensor on {value.device}")
        if any(not 0 < size < limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
            self.faults.append(f"{name}: grid {tuple(grid)}")


@functools.cache
def install() -> FakeGpu:
    """Make Triton "compile" and "launch" for an sm_90 that is not there; once, because kernels are kept."""
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    gpu = FakeGpu()

    class Kernel:
        function = 0
        packed_metadata = ()

        def __init__(self, name: str) -> None:
            self.name = name

        def launch_metadata(self, *_: object) -> None:
            return None

        def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
            gpu.launched(self.name, (x, y, z), arguments[6:])

    def compile(source: Any, target: object = None, options: object = None, **_: object) -> Kernel:
        gpu.compiled(source)
        return Kernel(source.fn.__name__)

    triton.compiler.compile = compile
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_device_interface=lambda: torch.cuda,
        )
    )
    _copy_without_cuda()
    return gpu


def _copy_without_cuda() -> None:
    """Let ``kernels.transfer`` make pinned memory and record events without a driver."""
    from aioengine.kernels import transfer

    class Torch:
        cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(record_event=lambda: None))

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        @staticmethod
        def empty(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return torch.empty(*sizes, **options)

    transfer.torch = Torch()  # type: ignore[assignment]


def run_on_fake_gpu(scenario: str, *arguments: str, file: str = "scenarios") -> Any:
    """Run a function of a file of ``gpu_without_gpu`` in a process of its own; returns what it returned."""
    with ProcessPoolExecutor(1, CONTEXT) as process:
        return msgspec.json.decode(process.submit(_play, file, scenario, arguments).result())


def _play(file: str, scenario: str, arguments: Sequence[str]) -> bytes:
    scenarios = importlib.import_module(f"gpu_without_gpu.{file}")
    return msgspec.json.encode(getattr(scenarios, scenario)(*arguments))
