"""Reads a checkpoint (Hugging Face safetensors, single or sharded, or GGUF) into a decoder."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.portable.dequantize import scales
from aioengine.kernels.portable.quantize import quantize
from aioengine.model.decoder import Decoder
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.folder import INDEX, check_exists, headers, shards, unreadable
from aioengine.model.files.packing import MXFP4, Packing
from aioengine.model.files.quantized import QuantizedFolder, quantized_folder
from aioengine.model.files.stacked_experts import StackedExperts
from aioengine.model.parallel.group import Ranges, take
from aioengine.model.spec import ModelSpec


class Stored(NamedTuple):
    """A tensor of a checkpoint, to be read before the iteration goes on."""

    shape: tuple[int, ...]
    read: Callable[[Sequence[slice]], Tensor]
    """Reads a part: a slice for each dimension."""


class StoredBlocks(NamedTuple):
    """A quantized weight of a checkpoint, to be read before the iteration goes on."""

    shape: tuple[int, ...]
    packing: Packing
    read: Callable[[], Mapping[str, Tensor]]
    """Reads the tensors of a :class:`BlockWeight`, under its names for them."""


def iter_checkpoint(path: Path, spec: ModelSpec) -> Iterator[tuple[str, Stored | StoredBlocks]]:
    """Yield every parameter of a model folder or a ``.gguf`` file, under its Hugging Face name, on the CPU.

    Of safetensors files, only what is asked for is read; a weight that is quantized is read as a whole.
    Raises :class:`ConfigError`, naming the file, if one is missing, malformed or disagrees with the
    index.
    """
    if path.suffix == ".gguf":
        from aioengine.model.files.gguf import GGUFFile, iter_stored

        for name, stored in iter_stored(GGUFFile(path), spec):
            if isinstance(stored.packing, Packing):
                yield name, StoredBlocks(stored.shape, stored.packing, stored.blocks)
            else:
                tensor = stored.tensor()
                yield name, Stored(tuple(tensor.shape), functools.partial(_part, tensor))
        return
    every = (pair for shard, keys in shards(path).items() for pair in _iter_safetensors(shard, keys))
    if isinstance(spec, MixtureSpec) and spec.interleaved:
        yield from _unstacked(every, StackedExperts(spec, str(path)))
        return
    quantized = quantized_folder(path)
    yield from every if quantized is None else _joined(every, quantized)


def load_weights(decoder: Decoder, path: Path, progress: LoadProgress | None = None) -> None:
    """Fill all of the decoder's parameters, converted to its dtype. ``progress`` is called with the progress.

    A decoder that is a rank's share gets the parts that it holds. Quantized weights for which the decoder
    has the same blocks stay as they are; the others are expanded. Where it has other blocks, or the file
    plain values, these are quantized.

    Raises :class:`ConfigError`, naming the file and the key, unless every expected parameter arrives
    exactly once, in the expected shape, and nothing unknown does.
    """
    if decoder.spec.tie_embeddings and path.suffix != ".gguf":
        _check_tied(path)
    missing: dict[str, Tensor | BlockWeight] = {**decoder.parameters(), **decoder.block_weights()}
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
        own = (parameter.n, parameter.k) if isinstance(parameter, BlockWeight) else parameter.shape
        shape, part = partition.parameter(name, own)
        if stored.shape != shape:
            raise ConfigError(
                f"{path}: {name}: expected shape {shape} from the configuration, found {stored.shape}"
            )
        if isinstance(parameter, BlockWeight):
            packing = partition.whole.packed[name.removesuffix(".weight")]
            if isinstance(stored, StoredBlocks) and stored.packing == packing:
                _fill_blocks(parameter, stored, part, f"{path}: {name}")
            else:
                _quantize(parameter, packing, stored, part, f"{path}: {name}")
        else:
            _fill(parameter, stored, part, f"{path}: {name}")
            _check_finite(parameter, f"{path}: {name}")
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


def _check_tied(path: Path) -> None:
    """Raise :class:`ConfigError` if a head that the configuration ties to the embeddings is stored with other
    values. (transformers does not tie it then.)"""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if not headers(path).keys() >= set(names):
        return
    found = {
        name: stored.read([slice(0, n) for n in stored.shape])
        for shard, keys in shards(path).items()
        for name, stored in _iter_safetensors(shard, keys)
        if name in names
    }
    if not torch.equal(found[names[0]], found[names[1]]):
        raise ConfigError(
            f"{path}: {names[0]} differs from {names[1]}, but config.json has tie_word_embeddings=true (or "
            "leaves it out, where its family's default is true): set it to false, or delete the tensor"
        )


def _fill(parameter: Tensor, stored: Stored | StoredBlocks, part: Sequence[Ranges], where: str) -> None:
    if isinstance(stored, StoredBlocks):
        (columns,), filled = part[1], 0
        for values in _pieces(stored, parameter.dtype, part[0], where):
            values = values[:, columns]
            parameter[filled : filled + len(values), : values.shape[1]].copy_(values)
            filled += len(values)
        parameter[filled:].zero_()
        return
    pieces = [stored.read(piece) for piece in itertools.product(*part)]
    tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # only rows are of several ranges
    _check_floats(tensor, where)
    if tensor.shape != parameter.shape:  # the end of a vocabulary that is padded
        parameter.zero_()
    parameter[tuple(slice(0, n) for n in tensor.shape)].copy_(tensor)


def _pieces(stored: Stored | StoredBlocks, dtype: torch.dtype, rows: Ranges, where: str) -> Iterator[Tensor]:
    """Yield some whole rows of a weight at a time, those of blocks expanded in ``dtype``."""
    k = stored.shape[1]
    weight: BlockWeight | None = None
    if isinstance(stored, StoredBlocks):
        weight = BlockWeight(
            stored.packing.format,
            k=k,
            dtype=dtype,
            group=stored.packing.group or k,
            middle=stored.packing.middle,
            **_read_blocks(stored, where),
        )
    size = max(1, (1 << 22) // k)
    for part in rows:
        for begin in range(part.start, part.stop, size):
            end = min(begin + size, part.stop)
            if weight is not None:
                yield weight.rows(begin, end)
            elif isinstance(stored, Stored):
                values = stored.read([slice(begin, end), slice(0, k)])
                _check_floats(values, where)
                yield values


def _check_finite(tensor: Tensor, where: str) -> None:
    """Raise ConfigError if not all values are finite. Their sum takes less time than to copy them, and is not
    finite if one of them is not. It may overflow, too."""
    if not math.isfinite(tensor.sum()) and not bool(tensor.isfinite().all()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{where}: a value is not finite in {dtype}; the checkpoint is damaged, or needs another dtype"
        )


def _check_floats(tensor: Tensor, where: str) -> None:
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        raise ConfigError(f"{where}: expected floating point, found {tensor.dtype}")


def _quantize(
    weight: BlockWeight, packing: Packing, stored: Stored | StoredBlocks, part: Sequence[Ranges], where: str
) -> None:
    """Quantize whole rows, of which it keeps a part: so ranks have parts of the same weight."""
    (rows, (columns,)), k, filled = part, stored.shape[1], 0
    parts, to = _columns(packing, columns, k), weight.tensors()
    for values in _pieces(stored, torch.float32, rows, where):
        made = quantize(packing.format, values.to(weight.data.device).float(), packing.group or k)
        if not bool(made["scale"].isfinite().all()):
            raise ConfigError(f"{where}: a value is not finite; the checkpoint is damaged")
        for name, tensor in to.items():
            tensor[filled : filled + len(values)].copy_(made[name][:, parts[name]])
        filled += len(values)
    for tensor in to.values():  # the end of a vocabulary that is padded
        tensor[filled:].zero_()


def _columns(packing: Packing, columns: slice, k: int) -> dict[str, slice]:
    """Return the parts of a weight's tensors that the inputs ``columns`` have, which are whole groups."""
    data = slice(packing.row_bytes(columns.start), packing.row_bytes(columns.stop))
    size = packing.group or k
    groups = slice(columns.start // size, -(-columns.stop // size))
    return {"data": data, "scale": groups, "zero": groups}


def _fill_blocks(weight: BlockWeight, stored: StoredBlocks, part: Sequence[Ranges], where: str) -> None:
    """Copy a part, whose inputs are whole blocks and groups."""
    rows, (columns,) = part
    parts = _columns(stored.packing, columns, stored.shape[1])
    read = _read_blocks(stored, where)
    for name, to in weight.tensors().items():
        tensor = take(read[name], rows)[:, parts[name]] if name in parts else read[name]
        if len(tensor) < len(to):  # the end of a vocabulary that is padded
            to[len(tensor) :].zero_()
        to[: len(tensor)].copy_(tensor)


def _read_blocks(stored: StoredBlocks, where: str) -> Mapping[str, Tensor]:
    read = stored.read()
    if "scale" in read and not bool(scales(read["scale"]).isfinite().all()):
        raise ConfigError(f"{where}: a scale is not finite; the checkpoint is damaged")
    return read


def _part(tensor: Tensor, part: Sequence[slice]) -> Tensor:
    return tensor[tuple(part)]


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    """Whether it is a buffer that old checkpoints contain, or the copy of a tied head."""
    if name.endswith(("rotary_emb.inv_freq", "self_attn.k_scale", "self_attn.v_scale")):
        return True  # the last two are for caches in float8
    return name == "lm_head.weight" and spec.tie_embeddings


def _joined(
    every: Iterator[tuple[str, Stored]], quantized: QuantizedFolder
) -> Iterator[tuple[str, Stored | StoredBlocks]]:
    """Bring together the tensors of each quantized linear, which may be in several files."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, stored in every:
        module, _, kind = name.rpartition(".")
        layout = quantized.layouts.get(module)
        if layout is None or kind == "bias":
            yield name, stored
            continue
        tensors = waiting.setdefault(module, {})
        tensors[kind] = stored.read([slice(0, n) for n in stored.shape])
        if tensors.keys() == quantized.kinds[module]:
            del waiting[module]
            read = functools.partial(layout.read, tensors)
            yield f"{module}.weight", StoredBlocks((layout.n, layout.k), layout.packing, read)


def _unstacked(
    every: Iterator[tuple[str, Stored]], stacked: StackedExperts
) -> Iterator[tuple[str, Stored | StoredBlocks]]:
    """Give each expert's linears the names that they have in the decoder."""
    for name, stored in every:
        pieces = stacked.pieces(name, stored.shape, stored.read)
        if pieces is None:
            yield name, stored
            continue
        for own, found in pieces:
            if isinstance(found, Tensor):
                yield own, Stored(tuple(found.shape), functools.partial(_part, found))
            else:
                n, groups = found["scale"].shape
                yield own, StoredBlocks((n, groups * MXFP4.group), MXFP4, functools.partial(dict, found))


def _iter_safetensors(path: Path, expected: set[str] | None) -> Iterator[tuple[str, Stored]]:
    check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if expected is not None and (absent := sorted(expected - keys)):
                raise ConfigError(f"{path}: {absent[0]} is missing, which {INDEX} says it contains")
            for key in file.keys():  # noqa: SIM118  (not a dict)
                shape = tuple(file.get_slice(key).get_shape())
                yield key, Stored(shape, functools.partial(_read, path, file, key, shape))
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def _read(path: Path, file: Any, key: str, shape: tuple[int, ...], part: Sequence[slice]) -> Tensor:
    whole = all(len(range(n)[piece]) == n for n, piece in zip(shape, part, strict=True))
    try:
        tensor: Tensor = file.get_tensor(key) if whole else file.get_slice(key)[tuple(part)]
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    return tensor
