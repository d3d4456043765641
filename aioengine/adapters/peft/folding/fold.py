"""Rewrites an adapter of another PEFT method as a LoRA adapter that computes the same.

The result is a configuration and tensors in the form of PEFT's LoRA. They are checked and packed like those
of any adapter.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

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


class _Module(NamedTuple):
    linear: LinearShape
    keys: Mapping[str, str]
    """Parameter -> its key in the file."""
    rank: int
    """Rank of the folded pair."""
    scaling: float


class Folded(NamedTuple):
    """A LoRA adapter that computes the same."""

    config: PeftLoraConfig
    tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Makes its tensors, by PEFT's keys, of those in the file."""


class Fold:
    """An adapter that is to be folded.

    ``config`` describes it as if it were a LoRA adapter of its own rank and alpha.
    """

    def __init__(self, method: str, config: PeftLoraConfig, folder: AdapterFolder) -> None:
        self.config = config
        self._name = method
        self._method: Method = METHODS[method]
        self._folder = folder

    @classmethod
    def of(cls, fields: Mapping[str, msgspec.Raw], folder: AdapterFolder) -> Fold | None:
        """Return how to fold the adapter that ``fields``, those of its configuration file, describe; None if
        that is not needed, or not possible.

        Raises AdapterInvalid for settings that are malformed or not supported.
        """
        text = bytes(fields.get("peft_type", b"")).decode("utf-8", "replace")
        method = next((method for method in METHODS if text == f'"{method}"'), None)
        if method is None:
            return None
        settings = METHODS[method].settings
        as_lora = {name: value for name, value in fields.items() if name not in settings}
        as_lora |= {new: fields[old] for old, new in settings.items() if new is not None and old in fields}
        as_lora["peft_type"] = msgspec.Raw(b'"LORA"')
        if "lora_alpha" not in as_lora and "r" in as_lora:
            as_lora["lora_alpha"] = as_lora["r"]
        parsed = parse_config(as_lora, folder)
        trained = parsed.heads or parsed.saved or parsed.tokens
        if parsed.use_dora or parsed.lora_bias or parsed.use_rslora or trained:
            folder.invalid_config(
                f"peft_type={method!r} cannot be folded with use_dora, lora_bias, use_rslora, "
                "modules_to_save or trainable_token_indices; train it without them, or train a LoRA adapter"
            )
        return cls(method, parsed, folder)

    def plan(self, shapes: Mapping[str, tuple[int, ...]], slot: SlotLayout) -> Folded:
        """Check the file's keys and shapes, and return what it is folded to.

        Raises AdapterInvalid, and AdapterTooLarge for a folded rank that no slot has room for.
        """
        modules = self._modules(shapes, slot)
        ranks = {name: (module.rank, 1.0) for name, module in modules.items()}
        return Folded(
            replace(self.config, folded=ranks),
            lambda tensors: self._lora_tensors(modules, tensors),
        )

    def _modules(self, shapes: Mapping[str, tuple[int, ...]], slot: SlotLayout) -> Mapping[str, _Module]:
        """Return the file's modules by their names in the base model."""
        shared = {name: f"base_model.{name}" for name in self._method.shared}
        missing = [key for key in shared.values() if key not in shapes]
        if missing:
            self._folder.invalid_weights(
                f"{missing[0]!r} is missing, and the adapter cannot be computed without it; save it "
                "with save_projection=True, or make a LoRA adapter of it with peft.save_as_lora"
            )
        keys: dict[str, dict[str, str]] = defaultdict(dict)
        for key in shapes:
            if key in shared.values():
                continue
            path = WRAPPERS.sub("", key).removesuffix(".default").removeprefix("base_model.model.")
            module, _, parameter = path.rpartition(".")
            if parameter not in self._method.parts or not _NAME.fullmatch(module):
                self._folder.invalid_weights(
                    f"{key[:200]!r}: unknown key; an adapter of {self._name} has "
                    f"{', '.join(sorted(self._method.parts))} for each module"
                )
            keys[module][parameter] = key
        return {name: self._module(name, {**found, **shared}, shapes, slot) for name, found in keys.items()}

    def _module(
        self,
        name: str,
        keys: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        slot: SlotLayout,
    ) -> _Module:
        config = self.config
        place = slot.spec.find_module(f"model.{name}" if config.feature_extraction else name)
        if place is None or place[1] == "embed_tokens":
            self._folder.invalid_weights(
                f"{name!r} is not a linear of the base model; was the adapter trained on another model?"
            )
        if not config.targets(name):
            self._folder.invalid_weights(f"{name!r}: {CONFIG_FILE} does not target it")
        linear = slot.spec.linear(place[1])
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
                f"{name}: as a LoRA adapter, this one of {self._name} has rank {rank}, but "
                f"max_lora_rank is {slot.max_rank}; raise LoRAConfig.max_lora_rank, or train it with a "
                "smaller r"
            )
        return _Module(linear, keys, rank, self._method.scaling(config, name))

    def _lora_tensors(
        self, modules: Mapping[str, _Module], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors of the LoRA adapter, in float32, by PEFT's keys."""
        found: dict[str, Tensor] = {}
        shared = {name: tensors[f"base_model.{name}"].float() for name in self._method.shared}
        for name, module in modules.items():
            own = {
                parameter: tensors[key].float()
                for parameter, key in module.keys.items()
                if parameter not in shared
            }
            pair = self._method.fold(own, shared, module.linear.out_features, module.linear.in_features)
            factors = torch.full((len(pair.a),), module.scaling)
            found[f"base_model.model.{name}.lora_A.weight"] = scaled(pair.a, factors)
            found[f"base_model.model.{name}.lora_B.weight"] = pair.b
        return found
