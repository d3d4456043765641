"""A folder of prefixes: one safetensors file for the keys and values of each.

A file's metadata describes its prefix, and has the SHA-256 of its tensors. A file whose description is not
the wanted one, or whose tensors have another digest, is deleted. The folder is bounded: the files that were
used least recently are deleted for new ones. Files of other names are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aioengine.checks import parse_bytes
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.model.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("aioengine")

_NAME = re.compile(r"kv-[0-9a-f]{64}\.safetensors(\.[0-9a-f]+\.tmp)?")
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 2**24
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
_CODES = {name: code for code, name in _DTYPES.items()}


def open_files(config: EngineConfig, spec: ModelSpec) -> PrefixFiles | None:
    """Open the folder that the configuration names, if it does. Blocks.

    Raises ConfigError if it cannot be used, or if this model gives back parts of its prefixes."""
    if config.kv_cache_dir is None:
        return None
    if spec.longest_window is not None:
        raise ConfigError(
            f"kv_cache_dir={config.kv_cache_dir!r}: every layer of this model has a sliding window, so its "
            "prefixes are not kept whole; set kv_cache_dir=None"
        )
    bound = parse_bytes(config.kv_cache_dir_bytes, field="kv_cache_dir_bytes")
    files = PrefixFiles(Path(config.kv_cache_dir).expanduser(), bound)
    files.open()
    return files


class BadFile(Exception):
    """Error for a file that is damaged, or that holds something else."""


class PrefixFiles:
    """Files of prefixes in ``folder``, of ``most_bytes`` in all. Blocks. Several threads and engines may
    share a folder."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes

    def open(self) -> None:
        """Make the folder, which only this user may read, if it is not there.

        Raises ConfigError, also if others may write there: what they write would be believed."""
        named = f"kv_cache_dir={str(self.folder)!r}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stat = self.folder.stat()
            probe, descriptor = _create(self._path("0" * 64))
            os.close(descriptor)
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{named}: cannot be written: {error}") from error
        if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
            whose = f"belongs to user {stat.st_uid} and has mode {stat.st_mode & 0o777:o}"
            raise ConfigError(
                f"{named}: {whose}, so others may change what is read from it; name a new "
                "folder in it, or one of your own that only you may write (chmod go-w)"
            )

    def has(self, name: str) -> bool:
        """Whether there is a file; it counts as used then."""
        try:
            os.utime(self._path(name))
        except OSError:
            return False
        return True

    def write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> int:
        """Write a file, and delete others if there is no room; returns its bytes, 0 if the bound is smaller
        than that. Raises OSError."""
        parts = {key: tensor.contiguous() for key, tensor in tensors.items()}
        header: dict[str, Any] = {}
        end = 0
        for key, tensor in parts.items():
            code, begin, end = _CODES[str(tensor.dtype).removeprefix("torch.")], end, end + tensor.nbytes
            header[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        digest = hashlib.sha256(_layout(header))
        for tensor in parts.values():
            digest.update(_bytes_of(tensor))
        head = msgspec.json.encode({"__metadata__": {**about, "sha256": digest.hexdigest()}, **header})
        head += b" " * (-len(head) % 8)
        size = _LENGTH.size + len(head) + end
        if not self._make_room(size):
            return 0
        path = self._path(name)
        temporary, descriptor = _create(path)
        try:
            with open(descriptor, "wb") as file:
                file.write(_LENGTH.pack(len(head)))
                file.write(head)
                for tensor in parts.values():
                    file.write(_bytes_of(tensor))
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return size

    def read(self, name: str, about: Mapping[str, str]) -> dict[str, Tensor] | None:
        """Read a file; None if there is none. A file that is not what ``about`` says is deleted, with a
        warning. Raises OSError."""
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                tensors = _read(file.fileno(), os.fstat(file.fileno()).st_size, about)
        except FileNotFoundError:
            return None
        except BadFile as error:
            logger.warning("%s: %s; it is deleted, and the prefix is computed", path, error)
            path.unlink(missing_ok=True)
            return None
        self.has(name)
        return tensors

    def _path(self, name: str) -> Path:
        return self.folder / f"kv-{name}.safetensors"

    def _make_room(self, size: int) -> bool:
        """Delete the files that were used least recently until ``size`` bytes fit."""
        if size > self.most_bytes:
            return False
        found: list[tuple[float, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):  # another engine has just deleted it
                        stat = entry.stat(follow_symlinks=False)
                        found.append((stat.st_mtime, stat.st_size, entry.path))
        total = sum(own for _, own, _ in found) + size
        for _, own, path in sorted(found):
            if total <= self.most_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= own
        return True


def _create(path: Path) -> tuple[Path, int]:
    """Create a file that is to get the name ``path`` once it is complete; returns its name until then, which
    no other process has chosen, and its descriptor. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _read(descriptor: int, size: int, about: Mapping[str, str]) -> dict[str, Tensor]:
    import torch

    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = os.readv(descriptor, [view[done : done + 2**24]])
        if not count:
            raise BadFile("it was cut short while it was read")
        done += count
    try:
        [length] = _LENGTH.unpack_from(data)
        if length > min(_MAX_HEADER, size - _LENGTH.size):
            raise BadFile("its header is longer than it")
        header = msgspec.json.decode(
            view[_LENGTH.size : _LENGTH.size + length], type=dict[str, dict[str, Any]]
        )
        said = header.pop("__metadata__")
        body = view[_LENGTH.size + length :]
        digest = hashlib.sha256(_layout(header))
        digest.update(body)
        if said != {**about, "sha256": digest.hexdigest()}:
            same = said.keys() >= about.keys() and all(said[key] == about[key] for key in about)
            raise BadFile(
                "its content is damaged" if same else "it is of another model, or of other settings"
            )
        return {
            key: torch.frombuffer(
                body[slice(*part["data_offsets"])], dtype=getattr(torch, _DTYPES[part["dtype"]])
            ).view(part["shape"])
            for key, part in header.items()
        }
    except (struct.error, msgspec.DecodeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadFile(f"it is no file of a prefix ({error})") from error


def _layout(header: Mapping[str, Any]) -> bytes:
    """Return what the digest covers beside the data."""
    return msgspec.json.encode(header, order="sorted")


def _bytes_of(tensor: Tensor) -> memoryview:
    """View the bytes of a contiguous tensor, which must outlive the view."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class ModelFiles:
    """Files that a model is loaded from, as they are when this is made: before it is loaded. Blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded = self._stamps()

    def digest(self) -> str:
        """Compute the SHA-256 of the files. Blocks, for as long as reading them takes.

        Raises OSError, also if they have changed since the model was loaded."""
        digest = hashlib.sha256()
        self.check()
        for file, *_ in self._loaded:
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        self.check()
        return digest.hexdigest()

    def check(self) -> None:
        """Raise OSError if the files have changed since this was made. Blocks."""
        if self._stamps() != self._loaded:
            raise OSError(f"{self._path}: the model's files have changed since it was loaded")

    def _stamps(self) -> list[tuple[Path, int, int]]:
        """Return each file with its size and the time of its last change."""
        kinds = (".safetensors", ".gguf", ".bin", ".pt", ".json")
        path = self._path
        files = sorted(p for p in path.iterdir() if p.suffix in kinds) if path.is_dir() else [path]
        return [(file, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
