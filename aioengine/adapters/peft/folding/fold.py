"""Rewrites an adapter of another PEFT method as a LoRA adapter that computes the same.

The result is a configuration and tensors in the form of PEFT's LoRA. They are checked and packed like those
of any adapter.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from aioengine.adapters.peft.config import PeftLoraConfig, parse_config
from aioengine.adapters.peft.folder import CONFIG_FILE, invalid_config, invalid_weights, too_large
from aioengine.adapters.peft.folding.methods import METHODS, scaled
from aioengine.adapters.peft.targets import WRAPPERS
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import LinearShape, ModelSpec

_NAME = re.compile(r"[\w.]{1,300}", re.ASCII)
Fields = Mapping[str, Any]
"""Those of a configuration file."""
Shapes = Mapping[str, tuple[int, ...]]
"""Of a file's tensors, by key."""


class Folded(NamedTuple):
    """A LoRA adapter that computes the same."""

    config: PeftLoraConfig
    tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Makes its tensors, by PEFT's keys, of those in the file."""


def parse_plain(fields: Fields, what: str) -> PeftLoraConfig:
    """Parse the configuration of an adapter that is folded, for ``what`` it is. Raises AdapterInvalid for
    settings that are malformed or not supported."""
    config = parse_config(fields)
    trained = config.modules_to_save or config.tokens or config.alora_invocation_tokens
    if config.use_dora or config.lora_bias or trained:
        invalid_config(
            f"{what} cannot be folded with use_dora, lora_bias, modules_to_save, trainable_token_indices or "
            "alora_invocation_tokens; train it without them, or train a LoRA adapter"
        )
    return config


def fold_method(fields: Fields, shapes: Shapes, slot: SlotLayout) -> Folded:
    """Check an adapter of one of ``METHODS``, and return what it is folded to.

    Raises AdapterInvalid, and AdapterTooLarge for a folded rank that no slot has room for.
    """
    peft_type: str = fields["peft_type"]
    method = METHODS[peft_type]
    config = _as_lora(fields, peft_type, method.settings)
    shared = {name: f"base_model.{name}" for name in method.shared}
    for key in shared.values():
        if key not in shapes:
            invalid_weights(
                f"{key!r} is missing, and the adapter cannot be computed without it; save it with "
                "save_projection=True, or make a LoRA adapter of it with peft.save_as_lora"
            )
    keys: dict[str, dict[str, str]] = defaultdict(dict)
    for key in shapes.keys() - shared.values():
        path = WRAPPERS.sub("", key).removesuffix(".default").removeprefix("base_model.model.")
        name, _, parameter = path.rpartition(".")
        if parameter not in method.parts or not _NAME.fullmatch(name):
            invalid_weights(
                f"{key[:200]!r}: unknown key; an adapter of {peft_type} has "
                f"{', '.join(sorted(method.parts))} for each module"
            )
        keys[name][parameter] = key
    linears, ranks = dict[str, LinearShape](), dict[str, tuple[int, float]]()
    for name, found in sorted(keys.items()):
        n_in, n_out = linears[name] = _linear(name, config, slot.spec)
        own = {parameter: shapes[key] for parameter, key in (found | shared).items()}
        rank = method.rank(own, n_out, n_in)
        if rank is None:
            what = ", ".join(f"{parameter} {list(shape)[:8]}" for parameter, shape in sorted(own.items()))
            invalid_weights(f"the parameters of {name} do not fit a linear {n_in} -> {n_out}: {what}")
        if rank > slot.max_rank:
            too_large(
                f"{name}: as a LoRA adapter, this one of {peft_type} has rank {rank}, but max_lora_rank is "
                f"{slot.max_rank}; raise LoRAConfig.max_lora_rank, or train it with a smaller r"
            )
        ranks[name] = rank, 1.0

    def lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the LoRA adapter, in float32, by PEFT's keys."""
        common = {name: tensors[key].float() for name, key in shared.items()}
        made: dict[str, Tensor] = {}
        for name, (n_in, n_out) in linears.items():
            own = {parameter: tensors[key].float() for parameter, key in keys[name].items()}
            a, b = method.fold(own, common, n_out, n_in)
            factors = torch.full((len(a),), method.scaling(config, name))
            made[f"base_model.model.{name}.lora_A.weight"] = scaled(a, factors)
            made[f"base_model.model.{name}.lora_B.weight"] = b
        return made

    return Folded(replace(config, folded=ranks), lora)


def _as_lora(fields: Fields, peft_type: str, settings: Mapping[str, str | None]) -> PeftLoraConfig:
    """Return the configuration as if it were that of a LoRA adapter."""
    as_lora = {field: value for field, value in fields.items() if field not in settings}
    as_lora |= {new: fields[old] for old, new in settings.items() if new is not None and old in fields}
    as_lora["peft_type"] = "LORA"
    as_lora.setdefault("lora_alpha", as_lora.get("r"))
    config = parse_plain(as_lora, f"peft_type={peft_type!r}")
    if config.use_rslora:
        invalid_config(f"peft_type={peft_type!r} has no use_rslora; train it without")
    return config


def _linear(name: str, config: PeftLoraConfig, spec: ModelSpec) -> LinearShape:
    place = spec.find_module(f"model.{name}" if config.feature_extraction else name)
    if place is None or place[1] == "embed_tokens":
        invalid_weights(
            f"{name!r} is not a linear of the base model; was the adapter trained on another model?"
        )
    if not config.targets(name):
        invalid_weights(f"{name!r}: {CONFIG_FILE} does not target it")
    return spec.linear(place[1])
