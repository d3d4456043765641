"""Chooses the backend that runs a model step's operations on a device."""

from __future__ import annotations

import functools
import logging
import os

import torch

from aioengine.kernels.backend import Backend
from aioengine.kernels.portable import plain

logger = logging.getLogger("aioengine")

ENV = "AIOENGINE_KERNELS"
"""Environment variable that overrides the default backend."""


def available_backends(device_type: str) -> list[str]:
    """Return the names that :func:`get_backend` accepts for this type of device ("cpu", "cuda"), best first.

    On a CPU, the first call on a machine compiles the library (blocking).
    """
    return list(_backends(device_type))


def _backends(device_type: str) -> dict[str, Backend]:
    found: dict[str, Backend] = {"torch": plain}  # runs everywhere
    if device_type == "cuda" and (triton := _triton_backend()) is not None:
        found = {"triton": triton, **found}
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and (triton := _triton_backend()) is not None:
        found = {**found, "triton": triton}  # never the default: thousands of times slower, for tests
    if device_type == "cpu" and (cpu := _cpu_backend()) is not None:
        found = {"cpu": cpu, **found}
    return found


@functools.cache
def _triton_backend() -> Backend | None:
    try:
        from aioengine.kernels.triton import backend, launch
    except ImportError as error:
        logger.warning(
            "the GPU kernels are not available: %s. Plain torch is used in their place; install triton", error
        )
        return None
    if torch.cuda.is_available():
        try:
            launch.check_launch()
        except Exception as error:  # errors of the compiler, the linker or the driver
            logger.warning(
                "the GPU kernels cannot be launched: %s: %s. Plain torch is used in their place; triton "
                "needs a C compiler and the headers of Python (on Debian: gcc and python3-dev)",
                type(error).__name__,
                error,
            )
            return None
    return backend


@functools.cache
def _cpu_backend() -> Backend | None:
    from aioengine.kernels.cpu import backend
    from aioengine.kernels.cpu.build import Unavailable
    from aioengine.kernels.cpu.shared_library import load

    try:
        load()
    except Unavailable as error:
        logger.warning(
            "the CPU kernels are not available: %s. Plain torch is used in their place: about half of the "
            "throughput is lost, with LoRA more",
            error,
        )
        return None
    return backend


def get_backend(device_type: str, name: str | None = None) -> Backend:
    """Return the backend called ``name``, else that of the variable AIOENGINE_KERNELS, else the device's
    best.

    Raises ValueError, listing what is available, if there is no such backend for the device.
    """
    backends = _backends(device_type)
    available = list(backends)
    chosen = name or os.environ.get(ENV) or available[0]
    if chosen not in available:
        source = "" if name else f" (from the environment variable {ENV})"
        raise ValueError(
            f"no kernel backend {chosen!r}{source} for device {device_type!r}; "
            f"available: {', '.join(available)}"
        )
    return backends[chosen]
