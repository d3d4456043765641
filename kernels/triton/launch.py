"""Launches of kernels, and what GPUs have for them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

OLDEST = 80
"""The lowest compute capability with bfloat16, copies that nothing waits for, and enough shared memory."""

OPTIONS = {"enable_fp_fusion": True}
"""Of every kernel. Products are added without being rounded first; Triton's own default is to change in
3.10."""

Grid = tuple[int, int, int]


class Launcher:
    """A kernel with values for its ``constants`` and options. Its parameters are tensors, then numbers, and
    then the constants."""

    def __init__(self, kernel: Any, **constants: int) -> None:
        self.kernel = kernel
        self.options = constants | OPTIONS

    def __call__(self, grid: Grid, tensors: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
        """Launch on the device of the first tensor."""
        device = tensors[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[grid](*tensors, *numbers, **self.options)


@functools.cache
def launcher(kernel: Any, **constants: int) -> Launcher:
    """Return the launcher of a kernel with these constants, which is made once."""
    return Launcher(kernel, **constants)


class Limits(NamedTuple):
    """What a GPU has for the programs of a launch."""

    shared_bytes: int
    """Shared memory of a program: from 64 KiB (AMD's MI200 and MI300) by way of 99 KiB (8.6, 8.9, 12.0) to
    227 KiB (9.0)."""
    warp_size: int
    """Threads of a warp: 32, or 64 on AMD's GPUs for data centers."""


HOPPER = Limits(227 * 1024, 32)


@functools.cache
def limits(device: torch.device) -> Limits:
    """Return what the driver says of a GPU; where there is none (the interpreter), an H100's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    # An NVIDIA GPU has more than this if a launch asks for it, as Triton's do. On AMD torch has one number.
    shared_bytes = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Limits(shared_bytes, found.warp_size)


@functools.cache
def capability(device: torch.device) -> int:
    """Return the compute capability of a GPU, 90 for 9.0; where there is none (the interpreter), as well.
    An AMD GPU, whose numbers have nothing to do with it, counts as the oldest one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    if torch.version.hip is not None:
        return OLDEST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def check_launch() -> None:
    """Compile and launch a kernel on the current GPU. Raises any error of these, and RuntimeError if the GPU
    is too old for the other kernels, or one of AMD's for graphics, on which they would not fit into
    registers.

    An import of triton does not show that it works: its first launch needs a C compiler, the headers of
    Python, and a GPU that its compiler knows.
    """
    found = capability(torch.device("cuda"))
    if found < OLDEST:
        raise RuntimeError(f"compute capability {found / 10}: they need {OLDEST / 10} (A100) or later")
    if torch.version.hip is not None and limits(torch.device("cuda")).warp_size != 64:
        raise RuntimeError("of AMD's GPUs they need one with 64 threads in a warp (MI200, MI300)")
    from aioengine.kernels.triton.jit.probe import probe_kernel

    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    probe_kernel[(1,)](out)
    torch.cuda.synchronize()
