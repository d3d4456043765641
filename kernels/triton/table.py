"""Block sizes of the kernels: rules that work everywhere."""

from __future__ import annotations

import functools
from typing import NamedTuple

from aioengine.kernels.triton.launch import power_of_two

SHORT = 16
"""Tokens of the longest segment up to which a batch counts as decoding: one tile holds any segment."""

AFFINE_COLUMNS = 128
EMBED_RANKS = 64
"""Columns and ranks that a program of the kernels that only move and scale takes, of ``SHORT`` tokens."""

_SMALLEST = 16
"""Smallest side of a block. Tensor cores work on 16 rows; masks fill up smaller ranks and tiles."""


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


@functools.cache  # called in every layer of every step
def shrink_config(bits: int, rank: int, width: int, longest: int) -> ShrinkConfig:
    """Return the block sizes for pools of ``rank`` over ``width`` inputs and segments of up to ``longest``
    tokens. Sizes that the order of sums depends on are those of decoding, so a prompt gives the same bits."""
    decode = default_shrink(Key.of("shrink", bits, rank, width, SHORT))
    found = default_shrink(Key.of("shrink", bits, rank, width, longest))
    return found._replace(block_k=decode.block_k, split_k=decode.split_k)


@functools.cache
def expand_config(bits: int, rank: int, width: int, longest: int) -> ExpandConfig:
    """Return the block sizes for pools of ``rank`` over slices of ``width`` outputs in all; see
    :func:`shrink_config`."""
    decode = default_expand(Key.of("expand", bits, rank, width, SHORT))
    return default_expand(Key.of("expand", bits, rank, width, longest))._replace(block_r=decode.block_r)


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
