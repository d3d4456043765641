"""Tensors of KV blocks as bytes for messages, and back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from aioengine.executors.process.wire import KvPart

if TYPE_CHECKING:
    from torch import Tensor

MESSAGE_BYTES = 2**22
"""Bytes of the messages to or from all ranks that the loop encodes or decodes at a time, unless those of one
block are larger."""


def portions(blocks: Sequence[int], block_bytes: int, ranks: int) -> Iterator[slice]:
    """Cut blocks into pieces, each of which is one message to or from every rank. ``block_bytes``: those of a
    block on each rank."""
    size = max(1, MESSAGE_BYTES // max(block_bytes * ranks, 1))
    for begin in range(0, len(blocks), size):
        yield slice(begin, begin + size)


def to_parts(tensors: Mapping[str, Tensor]) -> dict[str, KvPart]:
    """Copy tensors on the CPU into bytes."""
    return {name: _part(tensor.contiguous()) for name, tensor in tensors.items()}


def _part(tensor: Tensor) -> KvPart:
    data = bytearray((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return KvPart(str(tensor.dtype).removeprefix("torch."), list(tensor.shape), data)


def to_tensors(parts: Mapping[str, KvPart]) -> dict[str, Tensor]:
    """Make tensors of the bytes, which they keep."""
    import torch

    return {
        name: torch.frombuffer(part.data, dtype=getattr(torch, part.dtype)).view(part.shape)
        for name, part in parts.items()
    }


def of_rank(rank: int, ranks: int, name: str) -> str:
    """Return the name of a rank's tensor among those of all ranks; if there is one rank, it is the name
    itself."""
    return name if ranks == 1 else f"{rank}.{name}"


def joined(found: Sequence[Sequence[Mapping[str, KvPart]]]) -> dict[str, Tensor]:
    """Put together the answers of all ranks to each of several messages: tensors [blocks, ...]."""
    import torch

    pieces: dict[str, list[Tensor]] = {}
    for answers in found:
        for rank, parts in enumerate(answers):
            for name, tensor in to_tensors(parts).items():
                pieces.setdefault(of_rank(rank, len(answers), name), []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in pieces.items()}


def divided(contents: Mapping[str, Tensor], ranks: int, part: slice) -> list[dict[str, KvPart]]:
    """Return what each rank gets of some blocks of :func:`joined` contents."""
    if ranks == 1:
        return [to_parts({name: tensor[part] for name, tensor in contents.items()})]
    found: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in contents.items():
        rank, _, own = name.partition(".")
        found[int(rank)][own] = tensor[part]
    return [to_parts(tensors) for tensors in found]
