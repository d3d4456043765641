"""Reads a checkpoint (Hugging Face safetensors, single or sharded, or GGUF) into a decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aioengine.checks import read_json
from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.portable.dequantize import scales
from aioengine.kernels.portable.quantize import quantize
from aioengine.model.decoder import Decoder
from aioengine.model.files.packing import Packing
from aioengine.model.files.quantized import read_folder
from aioengine.model.files.stored import Checkpoint, Stored, StoredBlocks
from aioengine.model.parallel.group import Ranges, take
from aioengine.model.spec import ModelSpec


def _checkpoint(path: Path, spec: ModelSpec) -> Checkpoint:
    """Return the parameters of a model folder or a ``.gguf`` file, of which nothing is read yet."""
    if path.suffix == ".gguf":
        from aioengine.model.files.gguf import GGUFFile, read_file

        return read_file(GGUFFile(path), spec)
    return read_folder(path, spec, read_json(path / "config.json").get("quantization_config"))


def load_weights(decoder: Decoder, path: Path, progress: LoadProgress | None = None) -> None:
    """Fill all of the decoder's parameters, converted to its dtype. ``progress`` is called with the progress.

    A decoder that is a rank's share gets the parts that it holds. Quantized weights for which the decoder
    has the same blocks stay as they are; the others are expanded. Where it has other blocks, or the file
    plain values, these are quantized.

    Raises :class:`ConfigError`, naming the file and the key, unless every expected parameter arrives
    exactly once, in the expected shape, and nothing unknown does.
    """
    parameters, partition = decoder.parameters(), decoder.partition
    every = _checkpoint(path, partition.whole)
    if decoder.spec.tie_embeddings:
        _check_tied(path, every)
    every = {name: stored for name, stored in every.items() if not _is_ignored(name, decoder.spec)}
    for name in every:
        if name not in parameters:
            raise ConfigError(
                f"{path}: unexpected parameter {name}; the {decoder.spec.family} model that the "
                "configuration describes has no place for it"
            )
    if missing := [name for name in parameters if name not in every]:
        raise ConfigError(
            f"{path}: {len(missing)} of {len(parameters)} parameters are missing: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}"
        )
    done, total = 0, sum(parameter.nbytes for parameter in parameters.values())
    for name, parameter in parameters.items():
        stored, where = every.pop(name), f"{path}: {name}"
        own = (parameter.n, parameter.k) if isinstance(parameter, BlockWeight) else parameter.shape
        shape, part = partition.parameter(name, own)
        if stored.shape != shape:
            raise ConfigError(f"{where}: expected shape {shape} from the configuration, found {stored.shape}")
        if isinstance(parameter, BlockWeight):
            packing = partition.whole.packed[name.removesuffix(".weight")]
            if isinstance(stored, StoredBlocks) and stored.packing == packing:
                _fill_blocks(parameter, stored, part, where)
            else:
                _quantize(parameter, packing, stored, part, where)
        else:
            _fill(parameter, stored, part, where)
            _check_finite(parameter, where)
        done += parameter.nbytes
        if progress is not None:
            progress("Loading weights", done, total)


def _check_tied(path: Path, every: Checkpoint) -> None:
    """Raise :class:`ConfigError` if a head that the configuration ties to the embeddings is stored with other
    values. (transformers does not tie it then.)"""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    values = [stored.whole() for stored in map(every.get, names) if isinstance(stored, Stored)]
    if len(values) == 2 and not torch.equal(*values):
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
    weight = expanding(stored, dtype, where) if isinstance(stored, StoredBlocks) else None
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


def expanding(stored: StoredBlocks, dtype: torch.dtype, where: str) -> BlockWeight:
    """Read a quantized weight, whose rows are expanded in ``dtype``. Raises ConfigError, naming ``where``, if
    it is damaged."""
    packing, k = stored.packing, stored.shape[1]
    parts, group = _read_blocks(stored, where), packing.group or k
    return BlockWeight(packing.format, k=k, dtype=dtype, group=group, middle=packing.middle, **parts)


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


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    """Whether it is a buffer that old checkpoints contain, or the copy of a tied head."""
    if name.endswith(("rotary_emb.inv_freq", "self_attn.k_scale", "self_attn.v_scale")):
        return True  # the last two are for caches in float8
    return name == "lm_head.weight" and spec.tie_embeddings
