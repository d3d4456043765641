"""The tensors of a safetensors file: what its header says, views of its data, and how it is written.

A file's data is read into one buffer, and its tensors are views of it: no copy, no mapping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, chain, pairwise
from typing import Annotated, NamedTuple

import msgspec
import torch
from torch import Tensor

from aioengine.adapters.peft.folder import OpenFile, invalid, invalid_weights
from aioengine.model.buffer import Buffer

_MAX_HEADER_BYTES = 1 << 20
_MAX_TENSORS = 1 << 13
_MAX_COLONS = 8 * _MAX_TENSORS
"""A tensor's entry has four colons. Decoding holds the GIL for about a microsecond for each."""
_MAX_DIMS = 8
_ALIGN = 8
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes by their names in a header."""


class Entry(NamedTuple):
    """A tensor, or the part of one that is read."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int
    """Offset in the data, in bytes."""
    nbytes: int


_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
"""Upper bound of an offset: no file system holds a larger file."""


class _Described(msgspec.Struct):
    """A tensor in a header."""

    dtype: str
    shape: Annotated[tuple[_Natural, ...], msgspec.Meta(max_length=_MAX_DIMS)]
    data_offsets: tuple[_Natural, _Natural]


_DECODER = msgspec.json.Decoder(_Described)


class SafetensorsHeader(NamedTuple):
    """The format (huggingface/safetensors, "Format"): u64 header length, JSON header of
    name -> {dtype, shape, data_offsets}, then the data, which the offsets cover without gaps."""

    raw: bytes
    """The bytes of the file before the data."""
    data_bytes: int

    @classmethod
    def read(cls, file: OpenFile) -> SafetensorsHeader:
        """Read the header. Raises AdapterInvalid for a file that is too short, or a header too long for an
        adapter."""
        prefix = file.read(min(file.size, 8))
        length = int.from_bytes(prefix, "little")
        if file.size < 8 or length > file.size - 8:
            needed = 8 + length if file.size >= 8 else 8
            invalid_weights(f"truncated: the file has {file.size} bytes, but its header alone needs {needed}")
        if length > _MAX_HEADER_BYTES:
            invalid_weights(
                f"the header has {length} bytes; that of a LoRA adapter has at most {_MAX_HEADER_BYTES}"
            )
        return cls(prefix + file.read(length), file.size - 8 - length)

    def entries(self) -> list[Entry]:
        """Return the tensors sorted by offset, checked to cover the data exactly. Raises AdapterInvalid."""
        if self.raw.count(b":") > _MAX_COLONS:
            invalid_weights("the header has more entries than that of a LoRA adapter")
        key, entries = "", list[Entry]()
        try:
            described = msgspec.json.decode(self.raw[8:].decode(), type=dict[str, msgspec.Raw])
            described.pop("__metadata__", None)
            if len(described) > _MAX_TENSORS:
                invalid_weights(f"has {len(described)} tensors; a LoRA adapter has at most {_MAX_TENSORS}")
            for key, text in described.items():
                entries.append(_checked(key, _DECODER.decode(text)))
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            what = f"{key[:200]!r}: malformed header entry" if key else "the header is not valid JSON"
            invalid_weights(f"{what}: {error}")
        if not entries:
            invalid_weights("contains no tensors")
        entries.sort(key=lambda entry: (entry.begin, entry.nbytes))
        end = 0
        for entry in entries:
            if entry.begin != end:
                invalid_weights(f"{entry.key[:200]!r}: data begins at {entry.begin}, expected {end}")
            end += entry.nbytes
        reason = f"the header describes {end} bytes of data, the file has {self.data_bytes}"
        if end != self.data_bytes:
            invalid_weights(f"{'truncated' if end > self.data_bytes else 'malformed'}: {reason}")
        return entries


def _checked(key: str, described: _Described) -> Entry:
    dtype, shape, (begin, end) = DTYPES.get(described.dtype), described.shape, described.data_offsets
    if dtype is None:
        invalid_weights(
            f"{key[:200]!r}: dtype {described.dtype[:80]!r} is not supported; expected {', '.join(DTYPES)}"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        invalid_weights(
            f"{key[:200]!r}: data_offsets span {end - begin} bytes, but {described.dtype} of shape "
            f"{list(shape)} takes {nbytes}"
        )
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return Entry(key, dtype, shape, strides, begin, nbytes)


def tensors_of(buffer: Buffer, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Return tensors by key: views of ``buffer`` where alignment allows it."""
    data, size = buffer.tensor, len(buffer.tensor)
    flat = {dtype: data[: size - size % dtype.itemsize].view(dtype) for dtype in DTYPES.values()}

    def tensor(entry: Entry) -> Tensor:
        begin, rest = divmod(entry.begin, entry.dtype.itemsize)
        if rest:  # after an odd number of 16-bit values: allowed, although no library writes such
            copy = data[entry.begin : entry.begin + entry.nbytes].clone()
            return copy.view(entry.dtype).view(entry.shape)
        return flat[entry.dtype].as_strided(entry.shape, entry.strides, begin)

    return {entry.key: tensor(entry) for entry in entries}


def file_of(tensors: object) -> tuple[int, Iterator[memoryview]]:
    """Return the size and the content, in pieces, of a file of ``tensors``, a dict of PEFT's names to them.
    Raises AdapterInvalid if it is anything else."""
    if not isinstance(tensors, Mapping) or not tensors:
        invalid(
            "tensors: expected a dict of PEFT's names to tensors, as get_peft_model_state_dict returns it"
        )
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            invalid(
                f"tensors[{str(key)[:200]!r}]: expected a torch.Tensor under a str, found "
                f"{type(tensor).__name__} under {type(key).__name__}"
            )
        if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
            invalid(
                f"tensors[{key[:200]!r}]: {tensor.dtype} on {tensor.device} ({tensor.layout}) is not "
                f"supported; expected a dense tensor of {', '.join(map(str, DTYPES.values()))}"
            )
    # The widest dtype first, so that each is aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    names = {dtype: name for name, dtype in DTYPES.items()}
    ends = list(accumulate((tensor.nbytes for tensor in ordered.values()), initial=0))
    described = {
        key: _Described(names[tensor.dtype], tuple(tensor.shape), offsets)
        for (key, tensor), offsets in zip(ordered.items(), pairwise(ends), strict=True)
    }
    text = msgspec.json.encode(described)
    text += b" " * (-len(text) % _ALIGN)
    header = len(text).to_bytes(8, "little") + text
    return len(header) + ends[-1], chain((memoryview(header),), map(_bytes_of, ordered.values()))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in the order of a file, without a copy if it is contiguous on the CPU."""
    return tensor.detach().to("cpu").reshape(-1).view(torch.uint8).numpy().data
