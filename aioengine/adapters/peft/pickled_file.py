"""Reads ``torch.save`` files without unpickling them: which tensors they hold, and where their data lies.

Such a file is a zip archive whose records are stored as they are: ``data.pkl`` describes the tensors, and
``data/N`` is a tensor's memory. Only a dict of dense tensors can be read: the few pickle operations that it
needs are interpreted here. Nothing is imported or called, and no size in the file makes it allocate memory.
(``torch.load(weights_only=True)`` runs no code either, but it inflates compressed records and lets
``bytearray(10**11)`` allocate that much.)
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from aioengine.adapters.peft.folder import AdapterFolder, OpenFile
from aioengine.adapters.peft.weights_file import Weights
from aioengine.errors import AdapterInvalid
from aioengine.model.buffer import Buffer

_MAX_DIRECTORY_BYTES = 1 << 20
"""Bound on the archive's directory and on ``data.pkl``; an adapter of 4,000 tensors needs half of it."""
_MAX_DIMS = 8
_MAX_STACK = 10_000
"""A dict is written in batches of 1,000 items."""
_DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16}
_MARK = object()


class PickledTensor(NamedTuple):
    """A tensor in a file: a view of part of a record."""

    storage: str
    """The record, ``data/N``."""
    dtype: torch.dtype
    offset: int
    """Offset of its first element in the record."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of the record's elements that it spans."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


class PickledFile:
    """The tensors of ``file``, from its directory and ``data.pkl``. Raises AdapterInvalid."""

    def __init__(self, folder: AdapterFolder, file: OpenFile) -> None:
        self._folder = folder
        self._file = file
        records = self._records()
        root = next((name[: -len("data.pkl")] for name in records if name.endswith("data.pkl")), None)
        if root is None:
            self._refuse("has no data.pkl")
        if f"{root}byteorder" in records and self._record(records[f"{root}byteorder"]) != b"little":
            self._refuse("its numbers are big-endian")
        pickle = records[f"{root}data.pkl"]
        if pickle.file_size > _MAX_DIRECTORY_BYTES:
            self._refuse(f"its data.pkl has {pickle.file_size} bytes, more than {_MAX_DIRECTORY_BYTES}")
        self.tensors = self._tensors(self._record(pickle))
        self._begins: dict[str, int] = {}
        """Offsets in the file, in bytes, of the records that hold the tensors."""
        for key, tensor in self.tensors.items():
            record = records.get(f"{root}data/{tensor.storage}")
            size = tensor.dtype.itemsize
            if record is None or (tensor.offset + tensor.elements) * size > record.file_size:
                self._refuse(f"{key[:200]!r}: its data is not in the file")
            self._begins.setdefault(tensor.storage, self._begin(record))

    def views(self, data: Buffer) -> Weights:
        """Return the tensors as views of ``data``, which holds the whole file."""
        tensors = {}
        for key, tensor in self.tensors.items():
            size = tensor.dtype.itemsize
            begin = self._begins[tensor.storage] + tensor.offset * size
            span = data.view[begin : begin + tensor.elements * size]
            if begin % size:  # allowed, though torch aligns its records
                flat = torch.frombuffer(bytearray(span), dtype=tensor.dtype)
            else:
                flat = data.tensor[begin : begin + len(span)].view(tensor.dtype)
            tensors[key] = flat.as_strided(tensor.shape, tensor.stride, flat.storage_offset())
        return Weights(tensors, list(tensors.values()))

    # -- the archive -------------------------------------------------------------------------

    def _records(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(_Bounded(self._file)) as archive:
                records = archive.infolist()
        except _TooMuch:
            self._refuse(f"its directory has more than {_MAX_DIRECTORY_BYTES} bytes")
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
            self._refuse(f"not a torch.save archive ({error})", error)
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                self._refuse("has a compressed record")
        if sum(record.file_size for record in records) > self._file.size:
            self._refuse("its records overlap")
        return {record.filename: record for record in records}

    def _begin(self, record: zipfile.ZipInfo) -> int:
        """Find the start of a record's data, which follows a header of its own (APPNOTE.TXT 4.3.7)."""
        begin = record.header_offset + 30
        if 30 <= begin <= self._file.size:
            self._file.seek(record.header_offset)
            header = self._file.read(30)
            begin += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            if header.startswith(b"PK\x03\x04") and begin + record.file_size <= self._file.size:
                return begin
        self._refuse("has a record that is not where its directory says")

    def _record(self, record: zipfile.ZipInfo) -> bytes:
        begin = self._begin(record)
        self._file.seek(begin)
        return bytes(self._file.read(record.file_size))

    # -- data.pkl ----------------------------------------------------------------------------

    def _tensors(self, pickle: bytes) -> Mapping[str, PickledTensor]:
        try:
            state = _interpret(pickle)
        except _Foreign as error:
            self._refuse(f"not a file of plain tensors ({error})")
        except Exception as error:  # an empty stack, a text that is not UTF-8, ...
            self._refuse(f"not a file of plain tensors ({type(error).__name__})", error)
        if not isinstance(state, dict):
            self._refuse("expected a dict of tensors")
        if not state:
            self._refuse("contains no tensors")
        for key, value in state.items():
            if not isinstance(value, PickledTensor):
                self._refuse(f"{key[:200]!r}: expected a tensor")
        return state

    def _refuse(self, reason: str, cause: Exception | None = None) -> NoReturn:
        raise AdapterInvalid(
            f"{self._file.name}: {reason}; save the adapter with save_pretrained(..., "
            "safe_serialization=True), which writes safetensors",
            name=self._folder.name,
            path=self._folder.path,
        ) from cause


class _Foreign(Exception):
    """The file holds something that a dict of dense tensors does not need."""


class _TooMuch(Exception):
    """The file asks for a larger read than the directory of an adapter's file needs."""


class _Bounded(io.RawIOBase):
    """File wrapper for ``zipfile`` that bounds each read, because the file itself states the lengths."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._file.size)[whence]
        if at < 0:
            raise OSError("before the file's beginning")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._at)
        count = left if size < 0 else min(size, left)
        if count > _MAX_DIRECTORY_BYTES:
            raise _TooMuch
        self._file.seek(self._at)
        self._at += count
        return bytes(self._file.read(count))


class _Global(NamedTuple):
    """A callable that the pickle names."""

    module: str
    name: str


def _interpret(pickle: bytes) -> object:
    """Interpret the pickle; the result is made of str, int, bool, None, tuple, dict, _Global and
    PickledTensor.

    Raises _Foreign for an operation or a call that a dict of tensors does not need, and any other error for
    malformed bytes. Keys are str, so that no nested object of the file is hashed.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
        values = stack[at + 1 :]
        del stack[at:]
        return values

    def set_items(values: Sequence[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str):
                raise _Foreign("a key that is no str")
            stack[-1][key] = value

    argument: Any
    for operation, argument, _ in pickletools.genops(pickle):
        if len(stack) > _MAX_STACK:
            raise _Foreign("too many values")
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack[-1]
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Global(*argument.split(" ")))
            case "STACK_GLOBAL":
                stack[-2:] = [_Global(*stack[-2:])]
            case "BINPERSID":
                stack[-1] = _storage(stack[-1])
            case "REDUCE":
                stack[-2:] = [_call(*stack[-2:])]
            case "BUILD":  # attributes of the dict, with the versions of its modules; not needed
                stack.pop()
            case "SETITEM":
                items = stack[-2:]
                del stack[-2:]
                set_items(items)
            case "SETITEMS":
                set_items(since_mark())
            case other:
                raise _Foreign(other)
    raise _Foreign("it does not end")


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


def _storage(described: tuple[Any, ...]) -> _Storage:
    kind, storage, key, _device, _elements = described
    if kind != "storage" or not isinstance(storage, _Global) or storage.module != "torch":
        raise _Foreign("a storage of an unknown kind")
    if storage.name not in _DTYPES:
        raise _Foreign(f"a {storage.name[:80]}: expected float32, float16 or bfloat16")
    if not isinstance(key, str):
        raise _Foreign("a storage without a name")
    return _Storage(key, _DTYPES[storage.name])


def _call(function: Any, arguments: tuple[Any, ...]) -> object:
    """Carry out one of the allowed calls: a tensor, a parameter (as its tensor), or an empty dict."""
    match function, arguments:
        case _Global("collections", "OrderedDict"), ():
            return {}
        case _Global("torch._utils", "_rebuild_parameter"), (PickledTensor() as tensor, *_):
            return tensor
        case (
            _Global("torch._utils", "_rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(stride), *_),
        ):
            sizes = (offset, *shape, *stride)
            if len(shape) > _MAX_DIMS or len(shape) != len(stride):
                raise _Foreign(f"a tensor of {len(shape)} dimensions")
            if not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
                raise _Foreign("a tensor of an impossible shape")
            return PickledTensor(storage.key, storage.dtype, offset, shape, stride)
        case _Global(module, name), _:
            raise _Foreign(f"{module}.{name}"[:80])
    raise _Foreign("a call of an object that is no function")
