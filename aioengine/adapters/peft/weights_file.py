"""The weights of an adapter as named tensors, and the safetensors files that they are in.

A file's data is read into one buffer, and its tensors are views of it: no copy, no mapping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Annotated, NamedTuple

import msgspec
import torch
from torch import Tensor

from aioengine.adapters.peft.folder import AdapterFolder, OpenFile
from aioengine.errors import AdapterInvalid
from aioengine.model.buffer import Buffer

_MAX_HEADER_BYTES = 1 << 20
_MAX_TENSORS = 1 << 13
_MAX_COLONS = 8 * _MAX_TENSORS
"""A tensor's entry has four colons. Decoding holds the GIL for about a microsecond for each."""
_MAX_DIMS = 8
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""Names of dtypes in a header."""


class Weights:
    """The tensors of a file, of any mix of float32, float16 and bfloat16; ``build`` makes them, by key, when
    they are first needed."""

    def __init__(self, runs: Sequence[Tensor], build: Callable[[], Mapping[str, Tensor]]) -> None:
        self.runs = runs
        """The same values as few flat tensors, for operations that are faster over all of them at once."""
        self._build = build

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._build()


class Entry(NamedTuple):
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset in the data, in bytes."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The format (huggingface/safetensors, "Format"): u64 header length, JSON header of
    name -> {dtype, shape, data_offsets}, then the data, which the offsets cover without gaps."""

    raw: bytes
    """The bytes of the file before the data."""
    data_bytes: int

    @classmethod
    def read(cls, folder: AdapterFolder, file: OpenFile) -> SafetensorsHeader:
        """Read the header. Raises AdapterInvalid for a file that is too short, or a header
        too long for an adapter."""
        prefix = file.read(min(file.size, 8))
        length = int.from_bytes(prefix, "little")
        if file.size < 8 or length > file.size - 8:
            file.truncated(
                f"the file has {file.size} bytes, but its header alone needs "
                f"{8 + length if file.size >= 8 else 8}"
            )
        if length > _MAX_HEADER_BYTES:
            folder.invalid(
                f"{file.name}: the header has {length} bytes; that of a LoRA adapter has at most "
                f"{_MAX_HEADER_BYTES}"
            )
        return cls(bytes(prefix + file.read(length)), file.size - 8 - length)

    def entries(self, folder: AdapterFolder, file: OpenFile) -> list[Entry]:
        """Return the tensors sorted by offset, checked to cover the data exactly. Raises AdapterInvalid."""
        if self.raw.count(b":") > _MAX_COLONS:
            folder.invalid(f"{file.name}: the header has more entries than that of a LoRA adapter")
        try:
            described = msgspec.json.decode(self.raw[8:], type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise AdapterInvalid(
                f"{file.name}: the header is not valid JSON: {error}", name=folder.name, path=folder.path
            ) from error
        described.pop("__metadata__", None)
        if not described:
            folder.invalid(f"{file.name}: contains no tensors")
        if len(described) > _MAX_TENSORS:
            folder.invalid(
                f"{file.name}: has {len(described)} tensors; a LoRA adapter has at most {_MAX_TENSORS}"
            )
        entries = [_entry(folder, file, key, raw) for key, raw in described.items()]
        entries.sort(key=lambda entry: (entry.begin, entry.nbytes))
        end = 0
        for entry in entries:
            if entry.begin != end:
                folder.invalid(
                    f"{file.name}: {entry.key[:200]!r}: data begins at {entry.begin}, expected {end}"
                )
            end += entry.nbytes
        if end != self.data_bytes:
            reason = f"the header describes {end} bytes of data, the file has {self.data_bytes}"
            if end > self.data_bytes:
                file.truncated(reason)
            folder.invalid(f"{file.name}: malformed: {reason}")
        return entries


_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
"""Upper bound of an offset: no file system holds a larger file."""


class _Described(msgspec.Struct):
    """A tensor in a safetensors header."""

    dtype: str
    shape: Annotated[tuple[_Natural, ...], msgspec.Meta(max_length=_MAX_DIMS)]
    data_offsets: tuple[_Natural, _Natural]


def _entry(folder: AdapterFolder, file: OpenFile, key: str, raw: msgspec.Raw) -> Entry:
    try:
        described = _DECODER.decode(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise AdapterInvalid(
            f"{file.name}: {key[:200]!r}: malformed header entry: {error}", name=folder.name, path=folder.path
        ) from error
    dtype, shape, (begin, end) = _DTYPES.get(described.dtype), described.shape, described.data_offsets
    if dtype is None:
        folder.invalid(
            f"{file.name}: {key[:200]!r}: dtype {described.dtype[:80]!r} is not supported; expected "
            f"{', '.join(_DTYPES)}"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        folder.invalid(
            f"{file.name}: {key[:200]!r}: data_offsets span {end - begin} bytes, but "
            f"{described.dtype} of shape {list(shape)} takes {nbytes}"
        )
    return Entry(key, dtype, shape, begin, nbytes)


_DECODER = msgspec.json.Decoder(_Described)


def tensors_of(buffer: Buffer, entries: Sequence[Entry]) -> Weights:
    """Return the data of a safetensors file as tensors: views of ``buffer`` where alignment allows it."""
    groups = [list(group) for _, group in groupby(entries, key=lambda entry: entry.dtype)]
    runs = [_flat(buffer, group) for group in groups]

    def build() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for flat, group in zip(runs, groups, strict=True):
            pieces = flat.split_with_sizes([math.prod(entry.shape) for entry in group])
            tensors |= {
                entry.key: piece.view(entry.shape) for entry, piece in zip(group, pieces, strict=True)
            }
        return tensors

    return Weights(runs, build)


def _flat(buffer: Buffer, entries: Sequence[Entry]) -> Tensor:
    """Return the data of entries of one dtype that follow each other."""
    dtype, begin, end = entries[0].dtype, entries[0].begin, entries[-1].begin + entries[-1].nbytes
    if begin % dtype.itemsize:
        # After an odd number of 16-bit values: allowed, although no library writes such files.
        return torch.frombuffer(bytearray(buffer.view[begin:end]), dtype=dtype)
    return buffer.tensor[begin:end].view(dtype)
