"""The live engine that a calibration or a validation runs, beside its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from aioengine.config import Device, DType
from aioengine.model.spec import Quantization

Progress = Callable[[int, int, str], None]
"""Callback with the number of timings or runs done, their total, and the next one."""


class LiveSettings(TypedDict, total=False):
    """Fields of :class:`~aioengine.config.EngineConfig`; those that are not given have their defaults."""

    dtype: DType
    device: Device
    quantization: Quantization
    tensor_parallel_size: int
