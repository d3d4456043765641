"""Chooses the backend that runs the LoRA operations on a device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from aioengine.kernels import grouped, reference
from aioengine.kernels.batch import LoRABatch

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


_BACKENDS: dict[str, LoRABackend] = {"torch": grouped, "reference": reference}


def available_backends(device_type: str) -> list[str]:
    """The names that :func:`get_backend` takes on this type of device ("cpu", "cuda"), best first."""
    del device_type  # the plain-torch backends run everywhere
    return list(_BACKENDS)


def get_backend(device_type: str, name: str | None = None) -> LoRABackend:
    """The backend called ``name``; else by the variable AIOENGINE_KERNELS; else the device's best.

    Raises ValueError, listing what is available, if there is no such backend for the device.
    """
    available = available_backends(device_type)
    chosen = name or os.environ.get(ENV) or available[0]
    if chosen not in available:
        source = "" if name else f" (from the environment variable {ENV})"
        raise ValueError(
            f"no kernel backend {chosen!r}{source} for device {device_type!r}; "
            f"available: {', '.join(available)}"
        )
    return _BACKENDS[chosen]
