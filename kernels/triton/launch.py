"""Helpers that all launches share; :mod:`.launcher` launches."""

from __future__ import annotations

import functools

import torch

OLDEST = 80
"""The lowest compute capability with bfloat16, copies that nothing waits for, and enough shared memory."""


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
    is too old for the other kernels.

    An import of triton does not show that it works: its first launch needs a C compiler, the headers of
    Python, and a GPU that its compiler knows.
    """
    found = capability(torch.device("cuda"))
    if found < OLDEST:
        raise RuntimeError(f"compute capability {found / 10}: they need {OLDEST / 10} (A100) or later")
    from aioengine.kernels.triton.jit.probe import probe_kernel

    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    probe_kernel[(1,)](out)
    torch.cuda.synchronize()
