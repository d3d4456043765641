"""Keeps work that is done beside the steps, such as reading adapters, out of their way."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aioengine.kernels.cpu.shared_library import openmp_runtimes


@contextmanager
def calling_thread_alone() -> Iterator[None]:
    """Context in which torch computes in the calling thread, and not with a team of OpenMP threads, which
    would compete with a step's team for the cores. On Linux only: elsewhere nothing changes."""
    before = torch.get_num_threads()  # torch sets a new thread's number when it is first asked for
    for runtime in _runtimes():
        runtime.omp_set_num_threads(1)
    try:
        yield
    finally:
        for runtime in _runtimes():
            runtime.omp_set_num_threads(before)


@functools.cache
def _runtimes() -> list[ctypes.CDLL]:
    """Return the OpenMP runtimes of this process, where the number of threads is the calling thread's own."""
    return [ctypes.CDLL(path) for path in openmp_runtimes()]
