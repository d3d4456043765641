"""The safetensors files of a Hugging Face model folder, and what their headers say. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.errors import ConfigError
from aioengine.model.files.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _read(
    path: Path, opened: Callable[[], Any], key: str, shape: tuple[int, ...], part: Sequence[slice]
) -> Tensor:
    """Read a part of a tensor of this shape. Raises :class:`ConfigError`, naming the file."""
    from safetensors import SafetensorError

    whole = all(len(range(n)[piece]) == n for n, piece in zip(shape, part, strict=True))
    try:
        tensor: Tensor = opened().get_tensor(key) if whole else opened().get_slice(key)[tuple(part)]
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    return tensor


def tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a folder. Raises :class:`ConfigError`, naming the file, if one is missing,
    malformed or disagrees with the index."""
    from safetensors import SafetensorError, safe_open  # heavy, and the memory plan imports this module

    found: dict[str, Stored] = {}
    for path, expected in _shards(folder).items():
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file; the model folder must contain {SINGLE}, or {INDEX} and its shards"
            )
        own = cache(partial(safe_open, path, framework="pt"))  # when the first of its tensors is read
        try:
            with safe_open(path, framework="np") as opened:
                keys = set(opened.keys())
                for key in sorted(keys):
                    if key in found:
                        raise ConfigError(f"{path}: {key} is stored twice; expected each parameter once")
                    piece = opened.get_slice(key)
                    shape = tuple(piece.get_shape())
                    found[key] = Stored(shape, partial(_read, path, own, key, shape), piece.get_dtype())
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error) from error
        if absent := sorted(expected - keys):
            raise ConfigError(f"{path}: {absent[0]} is missing, which {INDEX} says it contains")
    return found


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Return the files of the weights, with the keys that each must hold.

    Raises :class:`ConfigError`, naming the file, if the index is malformed.
    """
    path = folder / INDEX
    if not path.is_file():
        return {folder / SINGLE: set()}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        found: dict[Path, set[str]] = {}
        for key, shard in weight_map.items():
            found.setdefault(folder / Path(shard).name, set()).add(key)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a safetensors index: expected a JSON object with a weight_map of "
            f"parameter names to file names ({type(error).__name__}: {error})"
        ) from error
    return found


def unreadable(path: Path, error: Exception) -> ConfigError:
    """Make the error for a file that is not in the safetensors format, or cannot be read: safetensors says
    "No such file or directory" for a file without permission."""
    try:
        path.open("rb").close()
    except OSError as why:
        return ConfigError(f"{path}: cannot be read: {why.strerror}")
    return ConfigError(f"{path}: not a readable safetensors file: {error}")
