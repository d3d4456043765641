"""Rewrites an adapter of another PEFT method as a LoRA adapter that computes the same.

The result is a configuration and tensors in the form of PEFT's LoRA. They are checked and packed like those
of any adapter.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import msgspec
import torch
from msgspec.structs import replace
from torch import Tensor

from aioengine.adapters.peft.config import PeftLoraConfig, parse_config
from aioengine.adapters.peft.folder import CONFIG_FILE, AdapterFolder
from aioengine.adapters.peft.folding.methods import METHODS, Method, scaled
from aioengine.adapters.peft.targets import WRAPPERS
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import LinearShape

_NAME = re.compile(r"[\w.]{1,300}", re.ASCII)
Fields = Mapping[str, msgspec.Raw]
"""Those of a configuration file."""
Shapes = Mapping[str, tuple[int, ...]]
"""Of a file's tensors, by key."""


class Folded(NamedTuple):
    """A LoRA adapter that computes the same."""

    config: PeftLoraConfig
    tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Makes its tensors, by PEFT's keys, of those in the file."""


class Fold(Protocol):
    """An adapter that is to be folded. ``config`` describes it as if it were a LoRA adapter."""

    @property
    def config(self) -> PeftLoraConfig: ...

    def plan(self, shapes: Shapes, slot: SlotLayout) -> Folded:
        """Check the file's keys and shapes, and return what it is folded to.

        Raises AdapterInvalid, and AdapterTooLarge for a folded rank that no slot has room for.
        """


def parse_plain(fields: Fields, folder: AdapterFolder, what: str) -> PeftLoraConfig:
    """Parse the configuration of an adapter that is folded, for ``what`` it is. Raises AdapterInvalid for
    settings that are malformed or not supported."""
    config = parse_config(fields, folder)
    trained = config.modules_to_save or config.tokens or config.alora_invocation_tokens
    if config.use_dora or config.lora_bias or trained:
        folder.invalid_config(
            f"{what} cannot be folded with use_dora, lora_bias, modules_to_save, trainable_token_indices or "
            "alora_invocation_tokens; train it without them, or train a LoRA adapter"
        )
    return config


class _Module(NamedTuple):
    linear: LinearShape
    keys: Mapping[str, str]
    """Parameter -> its key in the file."""
    scaling: float


class MethodFold:
    """An adapter of one of ``METHODS``."""

    def __init__(self, name: str, config: PeftLoraConfig, folder: AdapterFolder) -> None:
        self.config = config
        self._name = name
        self._method: Method = METHODS[name]
        self._folder = folder

    @classmethod
    def of(cls, fields: Fields, folder: AdapterFolder) -> MethodFold | None:
        """Return how to fold an adapter; None if that is not needed, or not possible. Raises
        AdapterInvalid."""
        text = bytes(fields.get("peft_type", b"")).decode("utf-8", "replace")
        name = next((name for name in METHODS if text == f'"{name}"'), None)
        if name is None:
            return None
        settings = METHODS[name].settings
        as_lora = {field: value for field, value in fields.items() if field not in settings}
        as_lora |= {new: fields[old] for old, new in settings.items() if new is not None and old in fields}
        as_lora["peft_type"] = msgspec.Raw(b'"LORA"')
        as_lora.setdefault("lora_alpha", as_lora.get("r", msgspec.Raw(b"null")))
        config = parse_plain(as_lora, folder, f"peft_type={name!r}")
        if config.use_rslora:
            folder.invalid_config(f"peft_type={name!r} has no use_rslora; train it without")
        return cls(name, config, folder)

    def plan(self, shapes: Shapes, slot: SlotLayout) -> Folded:
        shared = {name: f"base_model.{name}" for name in self._method.shared}
        missing = [key for key in shared.values() if key not in shapes]
        if missing:
            self._folder.invalid_weights(
                f"{missing[0]!r} is missing, and the adapter cannot be computed without it; save it "
                "with save_projection=True, or make a LoRA adapter of it with peft.save_as_lora"
            )
        keys: dict[str, dict[str, str]] = defaultdict(dict)
        for key in shapes.keys() - shared.values():
            path = WRAPPERS.sub("", key).removesuffix(".default").removeprefix("base_model.model.")
            name, _, parameter = path.rpartition(".")
            if parameter not in self._method.parts or not _NAME.fullmatch(name):
                self._folder.invalid_weights(
                    f"{key[:200]!r}: unknown key; an adapter of {self._name} has "
                    f"{', '.join(sorted(self._method.parts))} for each module"
                )
            keys[name][parameter] = key
        modules: dict[str, _Module] = {}
        ranks: dict[str, tuple[int, float]] = {}
        for name, found in sorted(keys.items()):
            linear = self._linear(name, slot)
            ranks[name] = self._rank(name, linear, {**found, **shared}, shapes, slot), 1.0
            modules[name] = _Module(linear, found, self._method.scaling(self.config, name))
        return Folded(replace(self.config, folded=ranks), lambda tensors: self._lora(modules, tensors))

    def _linear(self, name: str, slot: SlotLayout) -> LinearShape:
        place = slot.spec.find_module(f"model.{name}" if self.config.feature_extraction else name)
        if place is None or place[1] == "embed_tokens":
            self._folder.invalid_weights(
                f"{name!r} is not a linear of the base model; was the adapter trained on another model?"
            )
        if not self.config.targets(name):
            self._folder.invalid_weights(f"{name!r}: {CONFIG_FILE} does not target it")
        return slot.spec.linear(place[1])

    def _rank(
        self, name: str, linear: LinearShape, keys: Mapping[str, str], shapes: Shapes, slot: SlotLayout
    ) -> int:
        """Return the rank of a module's folded pair."""
        own = {parameter: shapes[key] for parameter, key in keys.items()}
        rank = self._method.rank(own, linear.out_features, linear.in_features)
        if rank is None:
            found = ", ".join(f"{parameter} {list(shape)[:8]}" for parameter, shape in sorted(own.items()))
            self._folder.invalid_weights(
                f"the parameters of {name} do not fit a linear {linear.in_features} -> "
                f"{linear.out_features}: {found}"
            )
        if rank > slot.max_rank:
            self._folder.too_large(
                f"{name}: as a LoRA adapter, this one of {self._name} has rank {rank}, but max_lora_rank is "
                f"{slot.max_rank}; raise LoRAConfig.max_lora_rank, or train it with a smaller r"
            )
        return rank

    def _lora(self, modules: Mapping[str, _Module], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the LoRA adapter, in float32, by PEFT's keys."""
        found: dict[str, Tensor] = {}
        shared = {name: tensors[f"base_model.{name}"].float() for name in self._method.shared}
        for name, (linear, keys, scaling) in modules.items():
            own = {parameter: tensors[key].float() for parameter, key in keys.items()}
            a, b = self._method.fold(own, shared, linear.out_features, linear.in_features)
            found[f"base_model.model.{name}.lora_A.weight"] = scaled(a, torch.full((len(a),), scaling))
            found[f"base_model.model.{name}.lora_B.weight"] = b
        return found
