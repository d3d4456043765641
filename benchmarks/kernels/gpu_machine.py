"""A GPU as benchmarks see it: its name, how times are taken on it, and what is predicted for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.testing

from aioengine.model.decode_graphs import Record
from aioengine.model.spec import ModelSpec
from benchmarks.kernels.predictions import LAUNCH, LLAMA_8B, Gpu, Kernel, gpu_of, seconds

REPEATS = 20
"""Calls of which a median is taken, after a quarter of them that do not count."""

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a function takes."""


class Machine(NamedTuple):
    """A GPU and its clocks."""

    device: str
    name: str
    seconds: Timer
    """On the device, with a cold L2 cache."""
    wall: Timer
    """From the call to the last result on the device."""
    host: Timer
    """Time that the host spends to enqueue."""
    spec: ModelSpec = LLAMA_8B
    """The model whose shapes are measured."""
    record: Record | None = None
    """How steps are recorded; None: as CUDA graphs."""

    @classmethod
    def here(cls, spec: ModelSpec = LLAMA_8B, device: str = "cuda") -> Machine:
        """Return the current GPU."""
        name = str(torch.cuda.get_device_name(device))
        wall, host = partial(wall_seconds, device=device), partial(host_seconds, device=device)
        return cls(device, name, gpu_seconds, wall, host, spec)

    @property
    def gpu(self) -> Gpu | None:
        """Facts that predictions are made from; None if there are none for this GPU."""
        return gpu_of(self.name)

    def predicted(self, *kernels: Kernel) -> float | None:
        """Return the time of launches, of which the first has none before it whose end it waits for."""
        if self.gpu is None:
            return None
        return sum(seconds(kernel, self.gpu.figures) for kernel in kernels) - LAUNCH


def gpu_seconds(function: Callable[[], object]) -> float:
    """Return the median time on the device."""
    milliseconds = triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median")
    return float(milliseconds) / 1e3


def host_seconds(function: Callable[[], object], device: str) -> float:
    """Return what the host spends to enqueue it."""
    taken = []
    for _ in range(2 * REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def wall_seconds(function: Callable[[], object], device: str) -> float:
    """Return the time from the call to the last result on the device, as whoever waits for tokens sees it."""
    taken = []
    for _ in range(REPEATS + REPEATS // 4):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[REPEATS // 4 :])
