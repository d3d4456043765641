"""Rewrites an adapter on bare parameters (``target_parameters``), such as the stacked weights of experts, as
one on the linears that are in them.

PEFT has one A [experts * r, in] and one B [out, r * experts] for all experts of a layer; each expert's rank
is r. Gate and up are one parameter there, and two linears to the native decoder: both get a copy of its A,
and their rows of B follow each other, or alternate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, NamedTuple

import msgspec
from msgspec.structs import replace
from torch import Tensor

from aioengine.adapters.peft.config import PeftLoraConfig, named_by
from aioengine.adapters.peft.folder import CONFIG_FILE, invalid_config, invalid_weights, too_large
from aioengine.adapters.peft.folding.fold import Fields, Folded, Shapes, parse_plain
from aioengine.adapters.peft.targets import WRAPPERS, modules_of
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import LinearShape, ModelSpec

TARGETS = "target_parameters"
_PREFIX = "base_model.model."
MAX_PARAMETERS = 2048
_Names = Annotated[list[str], msgspec.Meta(max_length=MAX_PARAMETERS)]


class _Parameter(NamedTuple):
    """A targeted parameter and the linears in it."""

    key: str
    """Beginning of its keys in the file."""
    experts: Sequence[Sequence[str]]
    """For each expert the names of its linears, one below the other in B, or with alternating rows."""
    linears: Sequence[tuple[str, LinearShape]]
    """Modules and shapes of one expert's."""
    rank: int
    scaling: float
    alternating: bool


def fold_parameters(fields: Fields, shapes: Shapes, slot: SlotLayout) -> Folded:
    """Check an adapter with ``target_parameters``, and return what it is folded to.

    Raises AdapterInvalid, and AdapterTooLarge for a rank that no slot has room for.
    """
    try:
        wanted = msgspec.convert(fields[TARGETS], _Names)
    except msgspec.ValidationError:
        invalid_config(f"{TARGETS}: expected a list of at most {MAX_PARAMETERS} strings")
    others = {name: value for name, value in fields.items() if name != TARGETS}
    if others.get("target_modules") is None:
        others["target_modules"] = []
    config = parse_plain(others, TARGETS)
    config = config.on(modules_of(shapes)) if config.unmatched else config
    known = {WRAPPERS.sub("", key): key for key in shapes}
    keys: dict[str, tuple[_Parameter, str]] = {}
    folded: dict[str, tuple[int, float]] = {}
    for parameter in _parameters(config, wanted, slot.spec):
        _check_room(parameter, slot)
        keys |= {_key(parameter, part, known, shapes): (parameter, part) for part in "AB"}
        for name in (name for names in parameter.experts for name in names):
            folded[name] = parameter.rank, parameter.scaling
            place = slot.spec.find_module(name)
            if place is not None and not slot.spec.is_bare(place[1]) and config.targets(name):
                invalid_config(f"{name} is in {TARGETS} and in target_modules")
    return Folded(replace(config, folded=folded), lambda tensors: dict(_tensors(tensors, keys)))


def _parameters(config: PeftLoraConfig, wanted: Sequence[str], spec: ModelSpec) -> Iterator[_Parameter]:
    """The targeted parameters, by the rules of PEFT's ``_inject_parameters``."""
    for owner, parameters in groupby(spec.bare_parameters(), lambda parameter: parameter.owner):
        chosen = [one for one in parameters if named_by(f"{owner}.{one.name}", wanted)]
        for inside, one in enumerate(chosen):
            name, key = f"{owner}.{one.name}", owner + ".base_layer" * (len(chosen) - 1 - inside)
            places = [spec.find_module(linear) for linear in one.experts[0]]
            linears = [(place[1], spec.linear(place[1])) for place in places if place is not None]
            rank = config.rank(name)
            yield _Parameter(key, one.experts, linears, rank, config.scaling(name, rank), one.alternating)


def _key(parameter: _Parameter, part: str, known: Mapping[str, str], shapes: Shapes) -> str:
    """Return the key of A or B in the file, whose shape is right. ``known``: keys by what they name."""
    spellings = [
        f"{prefix}{parameter.key}.lora_{part}.{suffix}"
        for prefix in (_PREFIX, "")
        for suffix in ("weight", "default.weight")
    ]
    key = next((known[key] for key in spellings if key in known), None)
    if key is None:
        invalid_weights(
            f"{CONFIG_FILE} targets a parameter, but the file has no {spellings[0]!r}; save the adapter "
            "again with PEFT"
        )
    rows = parameter.rank * len(parameter.experts)
    outputs = sum(linear.out_features for _, linear in parameter.linears)
    expected = (rows, parameter.linears[0][1].in_features) if part == "A" else (outputs, rows)
    if shapes[key] != expected:
        invalid_weights(
            f"{key!r}: expected shape {list(expected)} (rank {parameter.rank} of {CONFIG_FILE}, "
            f"{len(parameter.experts)} experts), found {list(shapes[key])[:8]}"
        )
    return key


def _check_room(parameter: _Parameter, slot: SlotLayout) -> None:
    for name, (module, _) in zip(parameter.experts[0], parameter.linears, strict=False):
        if module not in slot.modules:
            invalid_config(
                f"{TARGETS} means {name}, and the slots do not hold {slot.spec.kind_of(module)}: add it to "
                "LoRAConfig.target_modules"
            )
    if parameter.rank > slot.max_rank:
        too_large(
            f"{parameter.experts[0][0]} has rank {parameter.rank}, but max_lora_rank is {slot.max_rank}; "
            "raise LoRAConfig.max_lora_rank (PEFT doubles the rank of gate_up_proj, which holds two "
            "linears, where 'all-linear' or the names of these have chosen it)"
        )


def _tensors(
    tensors: Mapping[str, Tensor], keys: Mapping[str, tuple[_Parameter, str]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors by PEFT's keys for the linears: views of those in the file."""
    for key, tensor in tensors.items():
        if key not in keys:
            yield key, tensor
            continue
        parameter, part = keys[key]
        count = len(parameter.experts)
        for expert, names in enumerate(parameter.experts):
            if part == "A":
                pieces: Sequence[Tensor] = [tensor.view(count, parameter.rank, -1)[expert]] * len(names)
            else:
                whole = tensor.view(len(tensor), parameter.rank, count)[:, :, expert]
                alternate = [whole[first :: len(names)] for first in range(len(names))]
                pieces = alternate if parameter.alternating else whole.chunk(len(names))
            for name, piece in zip(names, pieces, strict=True):
                yield f"{_PREFIX}{name}.lora_{part}.weight", piece
