"""Experts that a checkpoint has as one tensor for all experts of a layer, as GPT-OSS does.

Gate and up are one such tensor, in which their outputs alternate. In MXFP4 (Rouhani et al., 2023,
arXiv:2310.10537) a tensor is stored as codes of four bits and a power of two for each 32 of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aioengine.errors import ConfigError
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.packing import MXFP4
from aioengine.model.files.stored import Checkpoint, Stored, StoredBlocks

if TYPE_CHECKING:
    from torch import Tensor

_STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)(|_bias|_blocks|_scales)")


def unstacked(path: Path, spec: MixtureSpec, tensors: Mapping[str, Stored]) -> Checkpoint:
    """Return the tensors of a folder, with those of each expert's linears in the place of the stacked ones.
    Weights in MXFP4 of which a part is missing are left out.

    Raises :class:`ConfigError`, naming the tensor, for an unexpected shape or type.
    """
    found: Checkpoint = {}
    for name, stored in tensors.items():
        if match := _STACKED.fullmatch(name):
            experts, stem, part = match.groups()
            _check(f"{path}: {name}", spec, stem, part, stored)
            scales = tensors.get(f"{experts}.{stem}_scales") if part == "_blocks" else None
            found |= _of_experts(spec, experts, stem, part, stored, scales)
        else:
            found[name] = stored
    return found


def _check(where: str, spec: MixtureSpec, stem: str, part: str, stored: Stored) -> None:
    size, hidden = spec.expert_size, spec.hidden_size
    n, k = (2 * size, hidden) if stem == "gate_up_proj" else (hidden, size)
    shape = {
        "": (k, n),
        "_bias": (n,),
        "_blocks": (n, MXFP4.groups(k), MXFP4.group // 2),
        "_scales": (n, MXFP4.groups(k)),
    }[part]
    if stored.shape != (spec.experts, *shape):
        raise ConfigError(
            f"{where}: expected shape {(spec.experts, *shape)} from the configuration, found {stored.shape}"
        )
    if part in ("_blocks", "_scales") and stored.dtype != "U8":
        raise ConfigError(f"{where}: expected U8, found {stored.dtype}")
    if part == "_blocks" and k % MXFP4.group:
        raise ConfigError(f"{where}: {k} inputs are no multiple of {MXFP4.group}")


def _of_experts(
    spec: MixtureSpec, experts: str, stem: str, part: str, stored: Stored, scales: Stored | None
) -> Iterator[tuple[str, Stored | StoredBlocks]]:
    """Yield the weight or bias of each linear that a stacked tensor has."""
    kinds = (spec.names.gate, spec.names.up) if stem == "gate_up_proj" else (spec.names.down,)
    for expert in range(spec.experts):
        for i, kind in enumerate(kinds):
            name, rows = f"{experts}.{expert}.{kind}", slice(i, None, len(kinds))
            if part in ("", "_bias"):
                n, *k = reversed(stored.shape[1:])
                read = partial(_plain, stored, expert, rows)
                yield f"{name}.{'bias' if part else 'weight'}", Stored((n // len(kinds), *k), read)
            elif scales is not None:
                shape = stored.shape[1] // len(kinds), stored.shape[2] * MXFP4.group
                yield (
                    f"{name}.weight",
                    StoredBlocks(shape, MXFP4, partial(_mxfp4, stored, scales, expert, rows)),
                )


def _of(stored: Stored, expert: int) -> Tensor:
    """Read what one expert has of a stacked tensor."""
    return stored.read([slice(expert, expert + 1), *(slice(0, n) for n in stored.shape[1:])])[0]


def _plain(stored: Stored, expert: int, rows: slice, part: Sequence[slice]) -> Tensor:
    values = _of(stored, expert)
    return (values.T if values.dim() == 2 else values)[rows][tuple(part)]


def _mxfp4(blocks: Stored, scales: Stored, expert: int, rows: slice) -> dict[str, Tensor]:
    return {"data": _of(blocks, expert).flatten(1)[rows], "scale": _of(scales, expert)[rows]}
