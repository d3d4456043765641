"""Reads a checkpoint (Hugging Face safetensors, single or sharded, or GGUF) into a decoder."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.model.decoder import Decoder
from aioengine.model.spec import ModelSpec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor of a checkpoint, to be read before the iteration goes on."""

    shape: tuple[int, ...]
    read: Callable[[Sequence[slice]], Tensor]
    """Reads a part: a slice for each dimension."""


def iter_checkpoint(path: Path, spec: ModelSpec) -> Iterator[tuple[str, Stored]]:
    """Every tensor of a model folder or a ``.gguf`` file, under its Hugging Face name, on the CPU.

    Of safetensors files, only what is asked for is read; a GGUF tensor is always expanded as a whole.
    Raises :class:`ConfigError`, naming the file, if one is missing, malformed or disagrees with the
    index.
    """
    if path.suffix == ".gguf":
        from aioengine.model.files.gguf import iter_tensors

        for name, tensor in iter_tensors(path, spec):
            yield name, Stored(tuple(tensor.shape), functools.partial(_part, tensor))
    elif (path / INDEX).is_file():
        for shard, keys in _read_index(path / INDEX).items():
            yield from _iter_safetensors(path / shard, keys)
    else:
        yield from _iter_safetensors(path / SINGLE, None)


def load_weights(decoder: Decoder, path: Path, progress: LoadProgress | None = None) -> None:
    """Fills all of the decoder's parameters, converting to its dtype; ``progress`` is told how far it is.

    A decoder that is a rank's share gets the parts that it holds.

    Raises :class:`ConfigError`, naming the file and the key, unless every expected parameter arrives
    exactly once, in the expected shape, and nothing unknown does.
    """
    missing = decoder.parameters()
    done, total = 0, sum(parameter.nbytes for parameter in missing.values())
    seen: set[str] = set()
    partition = decoder.partition
    for name, stored in iter_checkpoint(path, partition.whole):
        if _is_ignored(name, decoder.spec):
            continue
        if name in seen:
            raise ConfigError(f"{path}: {name} is stored twice; expected each parameter once")
        parameter = missing.pop(name, None)
        if parameter is None:
            raise ConfigError(
                f"{path}: unexpected parameter {name}; the {decoder.spec.family} model that the "
                "configuration describes has no place for it"
            )
        shape, part = partition.parameter(name, parameter.shape)
        if stored.shape != shape:
            raise ConfigError(
                f"{path}: {name}: expected shape {shape} from the configuration, found {stored.shape}"
            )
        tensor = stored.read(part)
        if not tensor.is_floating_point():
            raise ConfigError(f"{path}: {name}: expected floating point, found {tensor.dtype}")
        if tensor.shape != parameter.shape:  # the end of a vocabulary that is padded
            parameter.zero_()
        parameter[tuple(slice(0, n) for n in tensor.shape)].copy_(tensor)
        seen.add(name)
        done += parameter.nbytes
        if progress is not None:
            progress("Loading weights", done, total)
    if missing:
        first = ", ".join(list(missing)[:3])
        raise ConfigError(
            f"{path}: {len(missing)} of {len(missing) + len(seen)} parameters are missing: {first}"
            f"{', ...' if len(missing) > 3 else ''}"
        )


def _part(tensor: Tensor, part: Sequence[slice]) -> Tensor:
    return tensor[tuple(part)]


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    """Buffers that old checkpoints contain, and the copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and spec.tie_embeddings)


def _read_index(path: Path) -> dict[str, set[str]]:
    """The shards of an index file, each with the keys that it must hold."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {}
        for key, shard in weight_map.items():
            shards.setdefault(Path(shard).name, set()).add(key)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a safetensors index: expected a JSON object with a weight_map of "
            f"parameter names to file names ({type(error).__name__}: {error})"
        ) from error
    return shards


def _iter_safetensors(path: Path, expected: set[str] | None) -> Iterator[tuple[str, Stored]]:
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; the model folder must contain {SINGLE}, or {INDEX} and its shards"
        )
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if expected is not None and (absent := sorted(expected - keys)):
                raise ConfigError(f"{path}: {absent[0]} is missing, which {INDEX} says it contains")
            for key in file.keys():  # noqa: SIM118  (not a dict)
                shape = tuple(file.get_slice(key).get_shape())
                yield key, Stored(shape, functools.partial(_read, path, file, key, shape))
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _read(path: Path, file: Any, key: str, shape: tuple[int, ...], part: Sequence[slice]) -> Tensor:
    whole = all(len(range(n)[piece]) == n for n, piece in zip(shape, part, strict=True))
    try:
        tensor: Tensor = file.get_tensor(key) if whole else file.get_slice(key)[tuple(part)]
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return tensor


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: not a readable safetensors file: {error}")
