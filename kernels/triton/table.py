"""Block sizes of the kernels: measured ones from a file, or else rules that always work.

``python -m benchmarks gpu tune --write FILE`` measures on this machine's GPU and writes the file. The
environment variable AIOENGINE_TRITON_TABLE names the file. Nothing is measured while serving.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

from aioengine.kernels.triton.launch import power_of_two

ENV = "AIOENGINE_TRITON_TABLE"

SHORT = 16
"""Tokens of the longest segment up to which a batch counts as decoding: one tile holds any segment."""

AFFINE_COLUMNS = 128
EMBED_RANKS = 64
"""Columns and ranks that a program of the kernels that only move and scale takes, of ``SHORT`` tokens."""

ORDER = {"shrink": ("block_k", "split_k"), "expand": ("block_r",)}
"""Block sizes that the order of sums depends on."""

_SMALLEST, _LARGEST = 16, 512
"""Smallest and largest side of a block. Tensor cores work on 16 rows; masks fill up smaller ranks and
tiles."""


class ShrinkConfig(NamedTuple):
    block_m: int
    """Tokens of a tile."""
    block_r: int
    block_k: int
    split_k: int
    """Number of parts of the inputs; each is summed separately."""
    num_warps: int
    num_stages: int
    """Blocks of A and x in flight at once."""


class ExpandConfig(NamedTuple):
    block_m: int
    """Tokens of a tile."""
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """Properties that a configuration depends on."""

    op: str
    """"shrink" or "expand"."""
    bits: int
    """Bits of an element: 16 or 32."""
    rank: int
    """The pool's maximum, rounded up to a power of two."""
    width: int
    """Inputs of a shrink, outputs of all slices of an expand, rounded up to a power of two."""
    phase: str
    """"decode" if no segment is longer than ``SHORT`` tokens, else "prefill"."""

    @classmethod
    def of(cls, op: str, bits: int, rank: int, width: int, longest: int) -> Key:
        phase = "decode" if longest <= SHORT else "prefill"
        return cls(op, bits, power_of_two(rank), power_of_two(width), phase)

    def __str__(self) -> str:
        return f"{self.op}-{self.bits}bit-rank{self.rank}-width{self.width}-{self.phase}"


def shrink_config(bits: int, rank: int, width: int, longest: int) -> ShrinkConfig:
    """Return the block sizes for pools of ``rank`` over ``width`` inputs and segments of up to ``longest``
    tokens."""
    config = _chosen("shrink", bits, rank, width, longest <= SHORT, os.environ.get(ENV))
    assert isinstance(config, ShrinkConfig)
    return config


def expand_config(bits: int, rank: int, width: int, longest: int) -> ExpandConfig:
    """Return the block sizes for pools of ``rank`` over slices of ``width`` outputs in all; see
    :func:`shrink_config`."""
    config = _chosen("expand", bits, rank, width, longest <= SHORT, os.environ.get(ENV))
    assert isinstance(config, ExpandConfig)
    return config


@functools.cache  # called in every layer of every step
def _chosen(
    op: str, bits: int, rank: int, width: int, decode: bool, path: str | None
) -> ShrinkConfig | ExpandConfig:
    key = Key.of(op, bits, rank, width, SHORT if decode else SHORT + 1)
    default = default_shrink(key) if op == "shrink" else default_expand(key)
    found = measured(path).get(str(key), default)
    if decode:
        return found
    # The order of sums depends on sizes that are those of decoding, so a prompt gives the same bits.
    same = _chosen(op, bits, rank, width, True, path)
    return found._replace(**{field: getattr(same, field) for field in ORDER[op]})


def default_shrink(key: Key) -> ShrinkConfig:
    """Choose blocks with enough bytes in flight to keep the memory busy, within a third of an A100's shared
    memory. Products of float32 use no tensor cores, and take registers for their inputs, too."""
    block_m = 16 if key.phase == "decode" else 64
    full = key.bits > 16
    block_r = min(32 if full and block_m == 64 else 64, max(_SMALLEST, key.rank))
    rows = block_m + block_r
    block_k = 32 if full else 128
    split_k = 8 if key.width >= 8 * block_k else 1
    stages = 6 if rows <= 32 else 3 if rows <= 80 else 2
    return ShrinkConfig(block_m, block_r, block_k, split_k, 8 if rows > 80 and not full else 4, stages)


def default_expand(key: Key) -> ExpandConfig:
    block_m = 16 if key.phase == "decode" else 64
    full = key.bits > 16
    block_r = min(_SMALLEST if full else 64, max(_SMALLEST, key.rank))
    return ExpandConfig(block_m, 64 if full else 128, block_r, 4 if full or block_m == 16 else 8, 2)


@functools.cache
def measured(path: str | None) -> dict[str, ShrinkConfig | ExpandConfig]:
    """Read the configurations from a file of ``benchmarks gpu tune``; none without a path.

    Raises ValueError, naming the file and the entry, if it cannot be used.
    """
    if not path:
        return {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["configs"]
        return {name: _config(name, fields) for name, fields in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}, named by {ENV}, is no table of kernel configurations: {error!r}; unset the variable, "
            f"or write the file with: python -m benchmarks gpu tune --write {path}"
        ) from error


def _config(name: str, fields: dict[str, int]) -> ShrinkConfig | ExpandConfig:
    config = ShrinkConfig(**fields) if name.startswith("shrink-") else ExpandConfig(**fields)
    for field, value in config._asdict().items():
        low, high = (_SMALLEST, _LARGEST) if field.startswith("block_") else (1, 32)
        wrong = not isinstance(value, int) or not low <= value <= high
        if wrong or (field != "num_stages" and value & (value - 1)):
            raise ValueError(f"{name}: {field}={value!r} must be a power of two in {low}..{high}")
    return config
