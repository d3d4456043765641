"""Derives from the configuration and the base model which weights an adapter's file must hold, and which
tensor each key names.

PEFT's key formats (``get_peft_model_state_dict``): the adapter's name is normally removed from the keys, but
files written by hand keep it (``lora_A.default.weight``), and some tools drop ``base_model.model.``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from aioengine.adapters.peft.config import MERGE, PeftLoraConfig
from aioengine.adapters.peft.folder import CONFIG_FILE, invalid_config, invalid_weights, too_large
from aioengine.adapters.peft.folding.embeddings import EmbeddingParts
from aioengine.adapters.peft.values import HEAD_KINDS, WHOLE_KINDS, Part, Place
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import EMBEDDING_MODULES, NO_LAYER, LinearShape

_MATCH_SECONDS = 2.0
"""Time limit for matching all patterns of a configuration against all modules; normally milliseconds."""

_KEY = re.compile(
    r"(?:base_model\.model\.)?([\w.]{1,300}?)\."
    r"((?:lora_|base_layer\.|token_adapter\.|modules_to_save\.).+|weight|bias)",
    re.ASCII,
)
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Prefixes that torch.compile, activation checkpointing and FSDP insert into module names."""
_ENDS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base",
    "token_adapter.trainable_tokens_delta": "tokens",
    "weight": "saved",
    "modules_to_save.weight": "saved",
    "bias": "head_bias",
    "modules_to_save.bias": "head_bias",
}
"""Ends of keys, without the adapter's name, and the kinds of their tensors."""
_SETTINGS = {"bias": "lora_bias", "magnitude": "use_dora"}
"""Kinds of tensors that only adapters with a setting have."""
MAX_LABELS = 1024
"""Maximum number of labels of a classification head, which is kept beside the slot."""
_OF_EXPERTS = (
    "experts are parameters of this model (target_parameters), no modules: load it with PEFT and save it "
    "again, which converts it, and allow for twice its rank (LoRAConfig.max_lora_rank)"
)
_INNER = "model."
"""Prefix of a module's name in a model with a head."""
_REPLACED = (
    f"the adapter replaces embeddings or the head (perhaps resized), but modules_to_save in {CONFIG_FILE} "
    f"does not say so: save it with save_embedding_layers=False, or {MERGE}"
)
# Why a key that is no part of LoRA on a known module is refused: (part of the key, reason).
_FOREIGN_KEYS = (
    (".base_layer.", "it is a base-model weight: save the adapter with save_embedding_layers=False"),
    (
        "lora_embedding_",
        "LoRA is supported on embed_tokens of models that the native decoder runs, and on no other "
        f"embedding: {MERGE}",
    ),
    ("modules_to_save", f"fully trained modules are not supported: {MERGE}"),
    ("token_adapter", f"{CONFIG_FILE} has no such tokens in trainable_token_indices"),
    ("embed_tokens", _REPLACED),
    ("lm_head", _REPLACED),
    (".bias", f"trained biases of the base model are not supported: {MERGE}"),
)


def modules_of(keys: Iterable[str]) -> set[str]:
    """Return the names of the modules that a file's keys put LoRA on."""
    found = (_KEY.fullmatch(WRAPPERS.sub("", key)) for key in keys)
    return {match[1] for match in found if match is not None and match[2].startswith("lora_")}


class Target(NamedTuple):
    """An adapted module."""

    name: str
    """Name in the base model, which PEFT's patterns are matched against."""
    module: str
    rank: int
    scaling: float
    linear: LinearShape

    def shape(self, kind: str) -> tuple[int, ...]:
        """Return the shape of a part; a base weight is [vocabulary, hidden] for both embeddings."""
        n_in, n_out = self.linear
        base = (n_in, n_out) if self.module == "embed_tokens" else (n_out, n_in)
        return {"A": (self.rank, n_in), "B": (n_out, self.rank), "base": base}.get(kind, (n_out,))


class Layout:
    """The modules that ``config`` puts an adapter on, and what the tensors of its file are, or of what it is
    folded to. ``shapes``: theirs, by key.

    Raises AdapterInvalid if keys, shapes, configuration and slots do not agree, and AdapterTooLarge for a
    rank that ``slot`` has no room for.
    """

    def __init__(self, config: PeftLoraConfig, slot: SlotLayout, shapes: Mapping[str, Sequence[int]]) -> None:
        spec = self._spec = slot.spec
        self.config, self._modules = config, slot.modules
        embedding = (NO_LAYER, "embed_tokens")
        self.tied = (
            bool(config.ensure_weight_tying)
            and spec.tie_embeddings
            and embedding in spec.adaptable()
            and config.targets(spec.module_name(*embedding), linear=False)
        )
        """Whether PEFT adapts lm_head by the transposed adapter of the embeddings that it is tied to."""
        self.dora = bool(config.use_dora)
        self.embeddings = EmbeddingParts(config, spec) if config.tokens or config.saved else None
        """Rows of the embeddings and the head that the file has; None if it has none."""
        self._rows = {} if self.embeddings is None else self.embeddings.parts
        self.targets: dict[Place, Target] = {}
        """The targets, in the order of a packed adapter's tensors."""
        began = time.thread_time()
        for index, (layer, module) in enumerate(spec.adaptable()):
            self._add(layer, module)
            if index % 8 == 0 and time.thread_time() - began > _MATCH_SECONDS:
                invalid_config(
                    f"its patterns take more than {_MATCH_SECONDS:g} s to match; name the modules instead"
                )
        if config.lora_bias and embedding in self.targets:
            invalid_config("lora_bias with embed_tokens as a target: PEFT has no such adapter")
        if config.alora_invocation_tokens and embedding in self.targets:
            invalid_config(
                "alora_invocation_tokens with embed_tokens as a target: PEFT applies such an "
                "adapter to all tokens of the embeddings; train it without embed_tokens"
            )
        if self.embeddings is not None:
            self.embeddings.check_targets({module for layer, module in self.targets if layer == NO_LAYER})
        for target in self.targets.values():
            if target.rank > slot.max_rank:
                too_large(
                    f"{target.name} has rank {target.rank}, but max_lora_rank is {slot.max_rank}; raise "
                    "LoRAConfig.max_lora_rank or train the adapter with a smaller r"
                )
        self.parts = self._parts(shapes)
        """By key."""

    def _add(self, layer: int, module: str) -> None:
        config, name = self.config, self._spec.module_name(layer, module)
        if config.feature_extraction:
            name = name.removeprefix(_INNER)
        if self._spec.is_bare(module):
            targeted = name in config.folded
        else:
            targeted = config.targets(name, linear=module not in EMBEDDING_MODULES)
        if targeted or (self.tied and module == "lm_head"):
            rank, linear = config.rank(name), self._spec.linear(module)
            self.targets[layer, module] = Target(name, module, rank, config.scaling(name, rank), linear)

    def _parts(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Part]:
        if not any(".experts." in key for key in shapes):
            # Names such as gate_proj mean experts' linears only to libraries in which these are modules.
            others = {p: t for p, t in self.targets.items() if not p[1].startswith("experts.")}
            self.targets = others or self.targets
        taken: dict[Part, str] = {}
        for key, shape in shapes.items():
            part = self._named(key)
            if part.kind not in WHOLE_KINDS:
                self._check_target(key, part)
            if part in taken:
                invalid_weights(f"{key!r} and {taken[part]!r} are the same weight")
            taken[part] = key
            expected, of = self._expected(part, shape)
            if tuple(shape) != expected:
                invalid_weights(
                    f"{key!r}: expected shape {list(expected)} ({of}), found "
                    f"{list(shape[:8])}{'...' if len(shape) > 8 else ''}"
                )
        self._check_complete(taken)
        self._check_head(shapes, taken)
        return {key: part for part, key in taken.items()}

    def _named(self, key: str) -> Part:
        """Return what a key names. Raises AdapterInvalid if this adapter may not have it."""
        match = _KEY.fullmatch(WRAPPERS.sub("", key))
        kind = None if match is None else _ENDS.get(match[2].replace(".default", "", 1))
        if match is None or kind is None:
            self._refuse(key)
        module, end = match.groups()
        if module in self.config.heads and kind in ("saved", "head_bias"):
            return Part((NO_LAYER, module), "head" if kind == "saved" else kind)
        place = self._spec.find_module(module)
        if place is None and self.config.feature_extraction:
            place = self._spec.find_module(_INNER + module)
        if place is None or kind == "head_bias":
            self._refuse(key)
        part = Part(place, kind)
        if (
            (kind in WHOLE_KINDS and part not in self._rows)
            or (kind == "base" and place[1] not in EMBEDDING_MODULES)
            or (kind in ("A", "B") and ("_embedding_" in end) != (place[1] == "embed_tokens"))
        ):
            self._refuse(key)
        return part

    def _check_target(self, key: str, part: Part) -> None:
        """Check that the adapter, and a slot, has this part."""
        layer, module = part.place
        setting = _SETTINGS.get(part.kind)
        if module not in self._modules:
            invalid_weights(
                f"{key!r}: the slots do not hold {module}; they hold {self._kinds(self._modules)}: "
                f"add {module} to LoRAConfig.target_modules"
            )
        if part.place not in self.targets:
            name = self._spec.module_name(layer, module)
            invalid_weights(f"{key!r}: {CONFIG_FILE} does not target {name}")
        if setting is not None and not getattr(self.config, setting):
            invalid_weights(f"{key!r}: is a {part.kind}, but {CONFIG_FILE} does not set {setting}")

    def _expected(self, part: Part, shape: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """Return the shape that a tensor must have, and what it follows from."""
        hidden = self._spec.hidden_size
        if part.kind in HEAD_KINDS:
            labels = min(max(1, shape[0]), MAX_LABELS) if shape else MAX_LABELS
            of = f"a head of 1 to {MAX_LABELS} labels over {hidden} hidden units"
            return ((labels, hidden) if part.kind == "head" else (labels,)), of
        if part in self._rows:
            rows, of = self._rows[part]
            return (rows, hidden), of
        target = self.targets[part.place]
        linear = target.linear
        of = f"rank {target.rank} of {CONFIG_FILE}, base linear {linear.in_features} -> {linear.out_features}"
        return target.shape(part.kind), of

    def _check_head(self, shapes: Mapping[str, Sequence[int]], taken: Mapping[Part, str]) -> None:
        found = {part: shapes[key][0] for part, key in taken.items() if part.kind in HEAD_KINDS}
        if not self.config.heads and not found:
            return
        kinds = sorted(part.kind for part in found)
        if kinds not in (["head"], ["head", "head_bias"]) or len({part.place for part in found}) != 1:
            invalid_weights(
                f"{CONFIG_FILE} has modules_to_save={sorted(self.config.heads)}, and the file must have the "
                f"weight of one of them; it has {', '.join(taken[part] for part in found) or 'none'}"
            )
        if len(set(found.values())) != 1:
            invalid_weights("the head's weight and bias have different numbers of labels")

    def _kinds(self, modules: Sequence[str]) -> str:
        """Return modules for messages; those that all experts have once."""
        return ", ".join(dict.fromkeys(map(self._spec.kind_of, modules)))

    def _refuse(self, key: str) -> NoReturn:
        """Say why a key is refused that names no part of an adapter of this kind."""
        spec, places = self._spec, self._spec.adaptable()
        if ".experts." in key and spec.impl == "transformers":
            invalid_weights(f"{key[:200]!r}: {_OF_EXPERTS}")
        linears = (spec.module_name(*place) for place in places if place[1] not in EMBEDDING_MODULES)
        reason = next(
            (reason for part, reason in _FOREIGN_KEYS if part in key),
            f"unknown key; expected keys such as 'base_model.model.{next(linears, '<linear>')}.lora_<A|B>."
            f"weight' with a module of {self._kinds(spec.targets(None))} in one of {spec.num_layers} layers; "
            "was the adapter trained on another model?",
        )
        invalid_weights(f"{key[:200]!r}: {reason}")

    def _check_complete(self, taken: Mapping[Part, str]) -> None:
        for part in self._rows:
            if part not in taken:
                field = "trainable_token_indices" if part.kind == "tokens" else "modules_to_save"
                invalid_weights(
                    f"{CONFIG_FILE} has {part.place[1]} in {field}, but the file has no weights for it; save "
                    f"the adapter again with PEFT, or {MERGE}"
                )
        needed = ["A", "B", *(kind for kind, field in _SETTINGS.items() if getattr(self.config, field))]
        for place, target in self.targets.items():
            missing = [kind for kind in needed if Part(place, kind) not in taken]
            found = next((key for part, key in taken.items() if missing and part.place == place), None)
            if missing and found is None:
                invalid_weights(
                    f"{CONFIG_FILE} targets {target.name}, but the file has no weights for it; save "
                    "the adapter again with PEFT"
                )
            if missing:
                [end, *_] = (end for end, kind in _ENDS.items() if kind == missing[0])
                why = f", which {_SETTINGS[missing[0]]} needs" if missing[0] in _SETTINGS else ""
                invalid_weights(f"{found!r} has no matching {end}{why}")
