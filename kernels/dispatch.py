"""Chooses the backend that runs the LoRA operations on a device."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from aioengine.kernels import grouped, reference
from aioengine.kernels.batch import LoRABatch

logger = logging.getLogger("aioengine")

ENV = "AIOENGINE_KERNELS"
"""Environment variable that overrides the default backend."""


class LoRABackend(Protocol):
    """The LoRA operations, over tokens grouped by slot and for several fused slices at once.

    Shapes: T tokens, S slots, R the pool's maximum rank, n slices (3 for q, k, v of one fused linear).
    Only the tokens of ``batch.segments`` are touched. What slots without a segment hold never matters.
    In those with one, A's rows and B's columns from the adapter's rank up to R must be zero.
    """

    @property
    def name(self) -> str: ...

    def lora_shrink(self, x: Tensor, a: Tensor, batch: LoRABatch, n_slices: int) -> Tensor:
        """``h[t, j] = A[slot(t), j] x[t]``.

        ``x`` [T, in], ``a`` [S, n * R, in]; returns h [T, n, R] in x's dtype, zero wherever no adapter
        reaches (tokens without one, and columns from the adapter's rank on).
        """

    def lora_expand(
        self, h: Tensor, b: Sequence[Tensor], y: Tensor, offsets: Sequence[int], batch: LoRABatch
    ) -> None:
        """``y[t, offsets[j] : offsets[j] + out_j] += B[j][slot(t)] h[t, j]``, in place.

        ``h`` [T, n, R], ``b``: n tensors [S, out_j, R], ``y`` [T, >= max(offsets[j] + out_j)].
        """

    def lora_affine(
        self, y: Tensor, affine: Sequence[Tensor], offsets: Sequence[int], batch: LoRABatch
    ) -> None:
        """``y[t, offsets[j] : offsets[j] + out_j] += gain * y[t, ...] + shift``, in place.

        ``affine``: n tensors [S, 2, out_j], gain and shift of each slot. Only the tokens of
        ``batch.affine`` are touched. DoRA and trained biases come to this.
        """

    def lora_embed(self, token_ids: Tensor, a: Tensor, batch: LoRABatch) -> Tensor:
        """``h[t, 0] = A[slot(t)][:, token_ids[t]]``: :meth:`lora_shrink` of one-hot tokens.

        ``token_ids`` [T], ``a`` [S, R, vocabulary]; returns h [T, 1, R] in a's dtype, zero wherever no
        adapter reaches.
        """


def available_backends(device_type: str) -> list[str]:
    """The names that :func:`get_backend` takes on this type of device ("cpu", "cuda"), best first.

    On a CPU, the first call in the life of a machine compiles the library (blocking, a few seconds).
    """
    return list(_backends(device_type))


def _backends(device_type: str) -> dict[str, LoRABackend]:
    found: dict[str, LoRABackend] = {"torch": grouped, "reference": reference}  # these run everywhere
    if device_type == "cuda" and (triton := _triton_backend()) is not None:
        found = {"triton": triton, **found}
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and (triton := _triton_backend()) is not None:
        found = {**found, "triton": triton}  # never the default: thousands of times slower, for tests
    if device_type == "cpu" and (cpu := _cpu_backend()) is not None:
        found = {"cpu": cpu, **found}
    return found


@functools.cache
def _triton_backend() -> LoRABackend | None:
    try:
        from aioengine.kernels.triton import lora, table
    except ImportError as error:
        logger.warning(
            "the GPU kernels are not available: %s. Plain torch is used in their place; install triton", error
        )
        return None
    table.measured(os.environ.get(table.ENV))  # a file that cannot be used is refused now, not by a step
    return lora


@functools.cache
def _cpu_backend() -> LoRABackend | None:
    from aioengine.kernels.cpu import lora
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
    return lora


def get_backend(device_type: str, name: str | None = None) -> LoRABackend:
    """The backend called ``name``; else by the variable AIOENGINE_KERNELS; else the device's best.

    Raises ValueError, listing what is available, if there is no such backend for the device, or naming the
    file if AIOENGINE_TRITON_TABLE is no table of block sizes.
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
