"""The safetensors files of a Hugging Face model folder, and what their headers say. No torch here."""

from __future__ import annotations

import json
from pathlib import Path

from aioengine.errors import ConfigError
from aioengine.model.files.methods.scheme import Header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> dict[Path, set[str] | None]:
    """Return the files of the weights, with the keys that each must hold; None: any keys.

    Raises :class:`ConfigError`, naming the file, if the index is malformed.
    """
    path = folder / INDEX
    if not path.is_file():
        return {folder / SINGLE: None}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        found: dict[Path, set[str] | None] = {}
        for key, shard in weight_map.items():
            keys = found.setdefault(folder / Path(shard).name, set())
            assert keys is not None
            keys.add(key)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a safetensors index: expected a JSON object with a weight_map of "
            f"parameter names to file names ({type(error).__name__}: {error})"
        ) from error
    return found


def headers(folder: Path) -> dict[str, Header]:
    """Return every tensor of a folder, without its data. Raises :class:`ConfigError`, naming the file."""
    from safetensors import SafetensorError, safe_open  # heavy, and the memory plan imports this module

    found: dict[str, Header] = {}
    for path in shards(folder):
        check_exists(path)
        try:
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    piece = file.get_slice(key)
                    found[key] = Header(tuple(piece.get_shape()), piece.get_dtype())
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error) from error
    return found


def check_exists(path: Path) -> None:
    """Raise :class:`ConfigError` if there is no such file."""
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; the model folder must contain {SINGLE}, or {INDEX} and its shards"
        )


def unreadable(path: Path, error: Exception) -> ConfigError:
    """Make the error for a file that is not in the safetensors format, or cannot be read: safetensors says
    "No such file or directory" for a file without permission."""
    try:
        path.open("rb").close()
    except OSError as why:
        return ConfigError(f"{path}: cannot be read: {why.strerror}")
    return ConfigError(f"{path}: not a readable safetensors file: {error}")
