"""PEFT LoRA directories: read, validated against the base model, and packed for a slot.

Everything here blocks and is meant for a loader thread. Weight files are read with plain reads, not
mapped: a training job that truncates a mapped file under its reader kills the process (SIGBUS), and
``readinto`` and hashing release the GIL. Shapes are checked from the header before data is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, TypeGuard

import torch
from torch import Tensor

from aioengine.adapters.peft_config import CONFIG_FILE, PeftLoraConfig, parse_config
from aioengine.errors import AdapterInvalid, AdapterLoadError, AdapterTooLarge
from aioengine.model.spec import LORA_MODULES, ModelSpec

SAFETENSORS_FILE = "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"

_MAX_CONFIG_BYTES = 4 << 20
_MAX_HEADER_BYTES = 16 << 20
_SERIAL_ELEMENTS = 16384  # torch goes parallel from 32768 elements
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PARENT = {module: "mlp" if module[:-5] in ("gate", "up", "down") else "self_attn" for module in LORA_MODULES}
_KEY = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(0|[1-9][0-9]{0,5})\.(self_attn|mlp)\.(\w+)"
    r"\.lora_([AB])(?:\.default)?\.weight",
    re.ASCII,
)
# Why a key that is no lora_A or lora_B of a layer's linear is refused: (part of the key, reason).
_FOREIGN_KEYS = (
    ("lora_magnitude_vector", "DoRA is not supported"),
    ("lora_embedding", "LoRA on embeddings is not supported"),
    ("embed_tokens", "adapters that change the embeddings are not supported"),
    ("lm_head", "adapters that change lm_head are not supported"),
    (".bias", "trained biases are not supported"),
    ("modules_to_save", "fully trained modules are not supported"),
    (".base_layer.", "the file carries base-model weights; only LoRA weights can be swapped"),
)


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """A LoRA adapter in CPU memory, ready to be copied into a slot."""

    name: str
    path: str
    rank: int
    """The largest effective rank of its modules."""
    digest: str
    """SHA-256 (hex) over the configuration and the weights file: the identity of the content."""
    nbytes: int
    tensors: dict[tuple[int, str], tuple[Tensor, Tensor]]
    """(layer, module) -> (A [r, in], B [out, r]); B holds the scaling, so that delta = B @ A."""


class _Place(NamedTuple):
    layer: int
    module: str
    matrix: str
    """``A`` or ``B``."""


def read_adapter(
    name: str,
    path: str | Path,
    spec: ModelSpec,
    *,
    max_rank: int,
    target_modules: Sequence[str],
    dtype: torch.dtype,
    pin_memory: bool = False,
) -> PackedAdapter:
    """Read the PEFT directory ``path`` and check that it fits the base model and the slot pool.

    Args:
        max_rank: the rank that a slot holds (``max_lora_rank``).
        target_modules: the linears that slots hold, by their names in ``LORA_MODULES``.
        dtype: of the returned tensors; the scaling is folded into B in float32 and rounded once.
        pin_memory: put the tensors into page-locked memory (needs CUDA).

    Raises:
        AdapterLoadError: a file is missing or cannot be read.
        AdapterInvalid: malformed, unsupported, or made for another base model.
        AdapterTooLarge: a module's rank exceeds ``max_rank``.
    """
    return _Reader(name, str(path), spec, max_rank, target_modules).read(dtype, pin_memory)


@dataclass(frozen=True, slots=True)
class _Reader:
    name: str
    path: str
    spec: ModelSpec
    max_rank: int
    target_modules: Sequence[str]

    def read(self, dtype: torch.dtype, pin_memory: bool) -> PackedAdapter:
        self._check_folder()
        digest = hashlib.sha256()
        with self._open(CONFIG_FILE) as file:
            data = self._read_exactly(file, CONFIG_FILE, min(_size(file), _MAX_CONFIG_BYTES + 1))
        if len(data) > _MAX_CONFIG_BYTES:
            self._invalid(f"{CONFIG_FILE}: larger than {_MAX_CONFIG_BYTES} bytes")
        digest.update(data)
        config = parse_config(bytes(data), name=self.name, path=self.path)

        halves: dict[_Place, Tensor] = {}
        weights = SAFETENSORS_FILE
        if not self._exists(SAFETENSORS_FILE) and self._exists(BIN_FILE):
            weights = BIN_FILE
        with self._open(weights) as file:
            reader = self._safetensors if weights == SAFETENSORS_FILE else self._pickled
            for key, place, tensor in reader(file, config, digest.update):
                if not _is_finite(tensor):
                    self._invalid(f"{weights}: {key}: the weights contain NaN or infinity")
                halves[place] = tensor

        tensors = {}
        for layer, module in sorted({(p.layer, p.module) for p in halves}, key=_order):
            a = _scaled(halves[_Place(layer, module, "A")], 1.0, dtype)
            scaling = config.scaling(_full(layer, module))
            b = _scaled(halves[_Place(layer, module, "B")], scaling, dtype)
            if not (_is_finite(a) and _is_finite(b)):
                self._invalid(
                    f"{weights}: {_full(layer, module)}: the scaled weights overflow {dtype}; "
                    "set lora_dtype to bfloat16 or float32"
                )
            tensors[layer, module] = (a.pin_memory(), b.pin_memory()) if pin_memory else (a, b)
        return PackedAdapter(
            name=self.name,
            path=self.path,
            rank=max(a.shape[0] for a, _ in tensors.values()),
            digest=digest.hexdigest(),
            nbytes=sum(a.nbytes + b.nbytes for a, b in tensors.values()),
            tensors=tensors,
        )

    # -- what the file must contain ----------------------------------------------------------

    def _layout(
        self, file: str, config: PeftLoraConfig, shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, _Place]:
        """Each key's place, once keys, shapes and configuration are known to agree."""
        if not shapes:
            self._invalid(f"{file}: contains no tensors")
        places: dict[str, _Place] = {}
        taken: dict[_Place, str] = {}
        for key, shape in shapes.items():
            place = self._place(file, key)
            if place in taken:
                self._invalid(f"{file}: {key!r} and {taken[place]!r} are the same weight")
            self._check_shape(file, key, place, shape, config)
            places[key], taken[place] = place, key
        for place in taken:
            other = place._replace(matrix="B" if place.matrix == "A" else "A")
            if other not in taken:
                self._invalid(f"{file}: {taken[place]!r} has no matching lora_{other.matrix}")
        for layer in range(self.spec.num_layers):
            for module in LORA_MODULES:
                wanted = config.targets(_full(layer, module))
                if wanted and _Place(layer, module, "A") not in taken:
                    self._invalid(
                        f"{file}: {CONFIG_FILE} targets {_full(layer, module)}, but the file has "
                        "no weights for it; save the adapter again with PEFT"
                    )
        for module in ("model.embed_tokens", "lm_head"):
            if config.target_modules is not None and config.targets(module):
                self._invalid(f"{CONFIG_FILE}: targets {module}: LoRA on it is not supported")
        return places

    def _place(self, file: str, key: str) -> _Place:
        match = _KEY.fullmatch(key)
        if match is None or _PARENT.get(match[3]) != match[2]:
            reasons = (reason for part, reason in _FOREIGN_KEYS if part in key)
            reason = next(
                reasons,
                "unknown key; expected 'base_model.model.model.layers.<layer>.<self_attn|mlp>."
                "<module>.lora_<A|B>.weight' with a module of " + ", ".join(LORA_MODULES),
            )
            self._invalid(f"{file}: {key[:200]!r}: {reason}")
        layer, module = int(match[1]), match[3]
        if layer >= self.spec.num_layers:
            self._invalid(
                f"{file}: {key!r}: the base model has layers 0..{self.spec.num_layers - 1}; "
                "was the adapter trained on another model?"
            )
        if module not in self.target_modules:
            self._invalid(
                f"{file}: {key!r}: the slots do not hold {module}; they hold "
                f"{', '.join(self.target_modules)}: add {module} to LoRAConfig.target_modules"
            )
        return _Place(layer, module, match[4])

    def _check_shape(
        self, file: str, key: str, place: _Place, shape: Sequence[int], config: PeftLoraConfig
    ) -> None:
        full = _full(place.layer, place.module)
        if not config.targets(full):
            self._invalid(f"{file}: {key!r}: {CONFIG_FILE} does not target {full}")
        rank, linear = config.rank(full), self.spec.linear(place.module)
        if rank > self.max_rank:
            raise AdapterTooLarge(
                f"{CONFIG_FILE}: {full} has rank {rank}, but max_lora_rank is {self.max_rank}; "
                "raise LoRAConfig.max_lora_rank or train the adapter with a smaller r",
                name=self.name,
                path=self.path,
            )
        expected = (rank, linear.in_features) if place.matrix == "A" else (linear.out_features, rank)
        if tuple(shape) != expected:
            self._invalid(
                f"{file}: {key!r}: expected shape {list(expected)} (rank {rank} of {CONFIG_FILE}, "
                f"base linear {linear.in_features} -> {linear.out_features}), found {list(shape)}"
            )

    # -- file formats ------------------------------------------------------------------------

    def _safetensors(
        self, file: BinaryIO, config: PeftLoraConfig, hash_: Callable[[bytearray], None]
    ) -> Iterator[tuple[str, _Place, Tensor]]:
        """Tensors of a safetensors file in file order, every byte hashed.

        The format (huggingface/safetensors, "Format"): u64 header length, JSON header of
        name -> {dtype, shape, data_offsets}, then the data, which the offsets cover without gaps.
        """
        size = _size(file)
        prefix = self._read_exactly(file, SAFETENSORS_FILE, min(size, 8))
        length = int.from_bytes(prefix, "little")
        if size < 8 or length > size - 8:
            self._invalid(
                f"{SAFETENSORS_FILE}: truncated: the file has {size} bytes, but its header alone "
                f"needs {8 + length if size >= 8 else 8}"
            )
        if length > _MAX_HEADER_BYTES:
            self._invalid(f"{SAFETENSORS_FILE}: a header of {length} bytes is no LoRA adapter's")
        header = self._read_exactly(file, SAFETENSORS_FILE, length)
        hash_(prefix)
        hash_(header)
        entries = self._header_entries(header, size - 8 - length)
        places = self._layout(SAFETENSORS_FILE, config, {e.key: e.shape for e in entries})
        for entry in entries:
            data = self._read_exactly(file, SAFETENSORS_FILE, entry.nbytes)
            hash_(data)
            yield (
                entry.key,
                places[entry.key],
                torch.frombuffer(data, dtype=entry.dtype).view(entry.shape),
            )

    def _header_entries(self, header: bytearray, data_bytes: int) -> list[_Entry]:
        """The header's tensors ordered by offset, checked to cover ``data_bytes`` exactly."""
        try:
            raw = json.loads(header.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise AdapterInvalid(
                f"{SAFETENSORS_FILE}: the header is not valid JSON: {error}",
                name=self.name,
                path=self.path,
            ) from error
        if not isinstance(raw, dict):
            self._invalid(f"{SAFETENSORS_FILE}: the header is no JSON object")
        raw.pop("__metadata__", None)
        entries = [self._entry(key, value) for key, value in raw.items()]
        entries.sort(key=lambda entry: (entry.begin, entry.nbytes))
        end = 0
        for entry in entries:
            if entry.begin != end:
                self._invalid(
                    f"{SAFETENSORS_FILE}: {entry.key[:200]!r}: data begins at {entry.begin}, expected {end}"
                )
            end += entry.nbytes
        if end != data_bytes:
            self._invalid(
                f"{SAFETENSORS_FILE}: {'truncated' if end > data_bytes else 'malformed'}: the "
                f"header describes {end} bytes of data, the file has {data_bytes}"
            )
        return entries

    def _entry(self, key: str, value: object) -> _Entry:
        where = f"{SAFETENSORS_FILE}: {key[:200]!r}"
        if not isinstance(value, dict):
            self._invalid(f"{where}: malformed header entry")
        shape, offsets = value.get("shape"), value.get("data_offsets")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            self._invalid(f"{where}: malformed shape or data_offsets in the header")
        name = value.get("dtype")
        dtype = _DTYPES.get(name) if isinstance(name, str) else None
        if dtype is None:
            self._invalid(f"{where}: dtype {name!r} is not supported; expected {', '.join(_DTYPES)}")
        nbytes = dtype.itemsize
        for extent in shape:
            nbytes *= extent
        if offsets[1] - offsets[0] != nbytes:
            self._invalid(
                f"{where}: data_offsets span {offsets[1] - offsets[0]} bytes, but {name} of shape "
                f"{shape} takes {nbytes}"
            )
        return _Entry(key, dtype, tuple(shape), offsets[0], nbytes)

    def _pickled(
        self, file: BinaryIO, config: PeftLoraConfig, hash_: Callable[[bytearray], None]
    ) -> Iterator[tuple[str, _Place, Tensor]]:
        """Tensors of a ``torch.save`` file; only plain tensors are unpickled, no code runs."""
        data = self._read_exactly(file, BIN_FILE, _size(file))
        hash_(data)
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the malformed bytes lead to
            raise AdapterInvalid(
                f"{BIN_FILE}: not a file of plain tensors ({type(error).__name__}); save the "
                "adapter with save_pretrained(..., safe_serialization=True)",
                name=self.name,
                path=self.path,
            ) from error
        if not isinstance(state, dict):
            self._invalid(f"{BIN_FILE}: expected a dict of tensors, found {type(state).__name__}")
        for key, value in state.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                self._invalid(f"{BIN_FILE}: {str(key)[:200]!r}: expected a tensor")
            dense = value.layout == torch.strided and value.device.type == "cpu"
            if not dense or value.dtype not in _DTYPES.values():
                self._invalid(
                    f"{BIN_FILE}: {key[:200]!r}: {value.layout} {value.dtype} is not supported; "
                    "expected dense float32, float16 or bfloat16"
                )
        places = self._layout(BIN_FILE, config, {key: value.shape for key, value in state.items()})
        for key, value in state.items():
            yield key, places[key], value.detach()

    # -- files -------------------------------------------------------------------------------

    def _check_folder(self) -> None:
        try:
            mode = os.stat(self.path).st_mode
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise self._unreadable("the folder", error) from error
        if not stat.S_ISDIR(mode):
            raise AdapterLoadError(
                "is a file; expected the PEFT folder that contains it",
                name=self.name,
                path=self.path,
            )

    def _exists(self, file: str) -> bool:
        return os.path.lexists(os.path.join(self.path, file))

    def _open(self, file: str) -> BinaryIO:
        full = os.path.join(self.path, file)
        try:
            if not stat.S_ISREG(os.stat(full).st_mode):  # opening a pipe would block for ever
                raise AdapterLoadError(f"{file} is not a regular file", name=self.name, path=self.path)
            return open(full, "rb", buffering=0)
        except OSError as error:
            raise self._unreadable(file, error) from error

    def _read_exactly(self, file: BinaryIO, name: str, size: int) -> bytearray:
        data = bytearray(size)
        view, done = memoryview(data), 0
        try:
            while done < size:
                count = file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise AdapterLoadError(
                        f"{name} shrank while it was read; is something still writing it?",
                        name=self.name,
                        path=self.path,
                    )
                done += count
        except OSError as error:
            raise self._unreadable(name, error) from error
        return data

    def _unreadable(self, what: str, error: Exception) -> AdapterLoadError:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return AdapterLoadError(f"cannot read {what}: {reason}", name=self.name, path=self.path)

    def _invalid(self, reason: str) -> NoReturn:
        raise AdapterInvalid(reason, name=self.name, path=self.path)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Flat pieces that torch works on in the calling thread alone.

    An OpenMP team per loader thread would fight for the cores with the model's step: on a busy
    machine, loads take several times as long.
    """
    flat = tensor.reshape(-1)
    return tuple(flat[i : i + _SERIAL_ELEMENTS] for i in range(0, flat.numel(), _SERIAL_ELEMENTS))


def _is_finite(tensor: Tensor) -> bool:
    # aminmax propagates NaN and costs a fraction of isfinite().all().
    return all(math.isfinite(x.item()) for piece in _pieces(tensor) for x in piece.aminmax())


def _scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``tensor * factor``, computed in float32 and rounded once; contiguous."""
    result = torch.empty(tensor.shape, dtype=dtype)
    for source, target in zip(_pieces(tensor), _pieces(result), strict=True):
        target.copy_(source.float() * factor)
    return result


class _Entry(NamedTuple):
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _full(layer: int, module: str) -> str:
    """The linear's name in the base model, which PEFT's patterns are matched against."""
    return f"model.layers.{layer}.{_PARENT[module]}.{module}"


def _order(key: tuple[int, str]) -> tuple[int, int]:
    return key[0], LORA_MODULES.index(key[1])
