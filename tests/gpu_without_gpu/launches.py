"""Launches of a kernel by :class:`Launcher` and by Triton, side by side, on a driver that only notes them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from aioengine.kernels.triton import launcher
from aioengine.kernels.triton.launcher import Launcher

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8)
NUMBERS = (0, 1, 2, 15, 16, 17, 48, -1, 2**31 - 1, 2**31, 2**31 + 16, 2**63, True, False, 0.0, 1.0, 0.5)
GRID = (3, 2, 1)


@triton.jit(do_not_specialize=["loose"])
def kernel(a_ptr, b_ptr, count, loose, scale, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    pass


class Compiled:
    """A compiled kernel that only notes its launches."""

    packed_metadata = ("packed",)
    log: ClassVar[list[tuple[Compiled, tuple[Any, ...]]]] = []

    def __init__(self) -> None:
        self.function = object()

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.log.append((self, arguments))


class Here:
    """Properties of the driver that a test changes."""

    device = 0
    stream = 0
    backend = "cuda"

    def driver(self) -> Any:
        return SimpleNamespace(
            get_current_device=lambda: self.device,
            get_current_stream=lambda device: (device, self.stream),
            get_current_target=lambda: GPUTarget(self.backend, 90, 32),
        )


def _install() -> tuple[Here, Launcher]:
    import triton.compiler

    here = Here()
    triton.compiler.compile = lambda *_, **__: Compiled()
    driver.set_active(here.driver())
    return here, Launcher(kernel, BLOCK=64, FLAG=True, num_warps=4)


@contextlib.contextmanager
def _ways() -> Iterator[list[object]]:
    """A list that gets an entry for each launch by Triton itself."""
    taken: list[object] = []
    run = kernel.run

    def noted(*arguments: Any, **options: Any) -> Any:
        taken.append(None)
        return run(*arguments, **options)

    kernel.run = noted
    yield taken
    kernel.run = run


def _same(launch: Launcher, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> str:
    """Launch in both ways; returns how the launches differ, "" if they do not."""
    launch(GRID, tensors, numbers)
    kernel[GRID](*tensors, *numbers, BLOCK=64, FLAG=True, num_warps=4, enable_fp_fusion=True)
    (mine, got), (usual, expected) = Compiled.log[-2:]
    hooks = slice(6, 9)  # nothing here, and Triton's empty chains of hooks
    wrong = mine is not usual or got[:6] != expected[:6] or len(got) != len(expected)
    pairs = zip(got[hooks.stop :], expected[hooks.stop :], strict=False)
    wrong = wrong or any(type(a) is not type(b) or (a is not b and a != b) for a, b in pairs)
    return f"{numbers} {[(t.dtype, t.data_ptr() % 16) for t in tensors]}" if wrong else ""


def generated(count: str) -> tuple[list[str], int, int]:
    """(launches that differ, launches that went Triton's way, those of a tensor that begins elsewhere) for
    random dtypes, alignments, numbers, devices and streams."""
    here, launch = _install()
    rng = random.Random(0)
    memory = torch.empty(256, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 16 :]
    wrong, elsewhere = [], 0
    with _ways() as usual:
        for _ in range(int(count)):
            kinds = [rng.choice(DTYPES) for _ in range(2)]
            begins = [rng.choice([0, 0, 0, 16, 64, dtype.itemsize]) for dtype in kinds]
            places = zip(kinds, begins, strict=True)
            tensors = [memory[begin : begin + 32].view(dtype) for dtype, begin in places]
            here.device, here.stream = rng.randrange(2), rng.randrange(3)
            few = rng.random() < 0.8
            numbers = tuple(rng.choice(NUMBERS[:2] if few else NUMBERS) for _ in range(3))
            elsewhere += any(tensor.data_ptr() % 16 for tensor in tensors)
            wrong.append(_same(launch, tuple(tensors), numbers))
        return [case for case in wrong if case], len(usual) - int(count), elsewhere


def usual_ways() -> dict[str, list[int]]:
    """By reason, how many of two launches went Triton's way."""
    found = {}
    tensors, numbers = (torch.zeros(4), torch.zeros(4)), (16, 2, 0.5)

    def again(reason: str, launch: Launcher) -> None:
        counts = []
        for _ in range(2):
            with _ways() as usual:
                launch(GRID, tensors, numbers)
            counts.append(len(usual))
        found[reason] = counts

    here, launch = _install()
    again("first", launch)
    runtime, called = triton.knobs.runtime, []
    runtime.launch_enter_hook.add(called.append)
    again("hook", launch)
    runtime.launch_enter_hook.remove(called.append)
    kernel.add_pre_run_hook(lambda *_, **__: None)
    again("pre-run hook", launch)
    kernel.pre_run_hooks.clear()
    again("as before", launch)
    settings = launcher._runtime()
    launcher._runtime = lambda: SimpleNamespace(  # type: ignore[assignment] # as Triton 3.4 has it
        launch_enter_hook=settings.launch_enter_hook, launch_exit_hook=settings.launch_exit_hook
    )
    again("without later hooks", launch)
    launcher._runtime = lambda: settings  # type: ignore[assignment]
    driver.set_active(here.driver())
    again("another driver", launch)
    here.backend = "hip"
    driver.set_active(here.driver())
    again("another maker", Launcher(kernel, BLOCK=64, FLAG=True, num_warps=4))
    launcher._triton_is_known.cache_clear()
    launcher._SAME = "another Triton"
    again("another Triton", Launcher(kernel, BLOCK=64, FLAG=True, num_warps=4))
    return found


def devices() -> list[tuple[int, int]]:
    """(device, stream) of launches with tensors on devices that are not the current one, and the device that
    is current afterwards."""
    here, launch = _install()

    class There:
        dtype = torch.float32

        def __init__(self, index: int) -> None:
            self.device = SimpleNamespace(index=index)

        def data_ptr(self) -> int:
            return 64

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, here.device = here.device, index
        yield
        here.device = before

    torch.cuda.device = device  # type: ignore[misc,assignment]
    found = []
    for index in (0, 1, 1, 0, 2, 1):
        launch(GRID, (There(index), There(index)), (16, 2, 0.5))
        assert here.device == 0
        found.append(Compiled.log[-1][1][3])
    return found
