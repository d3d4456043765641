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

from aioengine.adapters.peft.config import PeftLoraConfig
from aioengine.adapters.peft.folder import CONFIG_FILE, AdapterFolder
from aioengine.adapters.peft.folding.embeddings import TOKEN_KINDS, EmbeddingParts
from aioengine.adapters.peft.unsupported import MERGE
from aioengine.model.spec import EMBEDDING_MODULES, NO_LAYER, LinearShape, ModelSpec

Place = tuple[int, str]
"""(layer, module), embeddings under ``NO_LAYER``."""

_MATCH_SECONDS = 2.0
"""Time limit for matching all patterns of a configuration against all modules; normally milliseconds."""

_KEY = re.compile(r"(?:base_model\.model\.)?([\w.]{1,300}?)\.((?:lora_|base_layer\.).+)", re.ASCII)
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Prefixes that torch.compile, activation checkpointing and FSDP insert into module names."""
_MAGNITUDES = {"lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"}
_LINEAR_KINDS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias", **_MAGNITUDES}
"""Ends of the keys of a linear, without the adapter's name, and what they are."""
_EMBEDDING_KINDS = {"lora_embedding_A": "A", "lora_embedding_B": "B", **_MAGNITUDES}
_PART_NAMES = {
    "A": "lora_A",
    "B": "lora_B",
    "bias": "lora_B.bias, which lora_bias needs",
    "magnitude": "lora_magnitude_vector, which use_dora needs",
}
HEAD_KINDS = ("head", "head_bias")
_WHOLE_KINDS = (*HEAD_KINDS, *TOKEN_KINDS)
MAX_LABELS = 1024
"""Maximum number of labels of a classification head, which is kept beside the slot."""
_OF_EXPERTS = (
    "experts are parameters of this model (target_parameters), no modules: load it with PEFT and save it "
    "again, which converts it, and allow for twice its rank (LoRAConfig.max_lora_rank)"
)
_HEAD = re.compile(
    r"(?:base_model\.model\.)?(score|classifier)\.(?:modules_to_save\.(?:default\.)?)?(weight|bias)", re.ASCII
)
_INNER = "model."
"""Prefix of a module's name in a model with a head."""
_BASE_WEIGHT = "base_layer.weight"
# Why a key that is no part of LoRA on a known module is refused: (part of the key, reason).
_FOREIGN_KEYS = (
    (
        ".base_layer.",
        "the file carries base-model weights; only LoRA weights can be swapped: save it with "
        "save_embedding_layers=False",
    ),
    (
        "lora_embedding_",
        "LoRA is supported on embed_tokens of models that the native decoder runs, and on no other "
        f"embedding: {MERGE}",
    ),
    ("modules_to_save", f"fully trained modules are not supported: {MERGE}"),
    ("token_adapter", f"{CONFIG_FILE} has no such tokens in trainable_token_indices"),
    (
        "embed_tokens",
        f"the adapter replaces the embeddings (perhaps resized), but {CONFIG_FILE} does not name them in "
        f"modules_to_save: save it with save_embedding_layers=False, or {MERGE}",
    ),
    (
        "lm_head",
        f"the adapter replaces lm_head (perhaps resized), but {CONFIG_FILE} does not name it in "
        f"modules_to_save: save it with save_embedding_layers=False, or {MERGE}",
    ),
    (".bias", f"trained biases of the base model are not supported: {MERGE}"),
)


def modules_of(keys: Iterable[str]) -> set[str]:
    """Return the names of the modules that a file's keys name."""
    found = (_KEY.fullmatch(WRAPPERS.sub("", key)) for key in keys)
    return {match[1] for match in found if match is not None}


def max_data_bytes(spec: ModelSpec, max_rank: int, target_modules: Sequence[str]) -> int:
    """Compute the largest size in a file of an adapter that fits, without saved base weights."""
    elements = 0
    for module in target_modules:
        linear = spec.linear(module)
        copies = spec.layers_with(module)
        elements += copies * (max_rank * sum(linear) + 2 * linear.out_features)
    return 4 * elements


class Part(NamedTuple):
    """One tensor's role: ``A``, ``B``, ``bias``, ``magnitude``, ``base`` (the unadapted weight), or one of
    ``HEAD_KINDS`` and ``TOKEN_KINDS``."""

    place: Place
    kind: str

    @property
    def is_whole(self) -> bool:
        """Whether each rank needs all of it: it is not a part of a target."""
        return self.kind in _WHOLE_KINDS


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
        match kind:
            case "A":
                return self.rank, self.linear.in_features
            case "B":
                return self.linear.out_features, self.rank
            case "base":
                vocabulary_first = self.linear if self.module == "embed_tokens" else self.linear[::-1]
                return tuple(vocabulary_first)
        return (self.linear.out_features,)


class Layout:
    """The modules that ``config`` puts an adapter on.

    Raises AdapterTooLarge for a rank over ``max_rank``.
    """

    def __init__(
        self,
        folder: AdapterFolder,
        config: PeftLoraConfig,
        spec: ModelSpec,
        *,
        max_rank: int,
        target_modules: Sequence[str],
    ) -> None:
        self._folder = folder
        self._config = config
        self._spec = spec
        self._modules = tuple(target_modules)
        self.tied = (
            config.ensure_weight_tying
            and spec.tie_embeddings
            and (NO_LAYER, "embed_tokens") in spec.adaptable()
            and config.targets(spec.module_name(NO_LAYER, "embed_tokens"), linear=False)
        )
        """Whether PEFT adapts lm_head by the transposed adapter of the embeddings that it is tied to."""
        self.dora = bool(config.use_dora)
        self.embeddings = EmbeddingParts(folder, config, spec)
        self.targets: dict[Place, Target] = {}
        """The targets, in the order of a packed adapter's tensors."""
        began = time.thread_time()
        for index, (layer, module) in enumerate(spec.adaptable()):
            self._add(layer, module)
            if index % 8 == 0 and time.thread_time() - began > _MATCH_SECONDS:
                folder.invalid_config(
                    f"its patterns take more than {_MATCH_SECONDS:g} s to match; name the modules instead"
                )
        if config.lora_bias and (NO_LAYER, "embed_tokens") in self.targets:
            folder.invalid_config("lora_bias with embed_tokens as a target: PEFT has no such adapter")
        if config.alora_invocation_tokens and (NO_LAYER, "embed_tokens") in self.targets:
            folder.invalid_config(
                "alora_invocation_tokens with embed_tokens as a target: PEFT applies such an "
                "adapter to all tokens of the embeddings; train it without embed_tokens"
            )
        self.embeddings.check_targets({module for layer, module in self.targets if layer == NO_LAYER})
        for target in self.targets.values():
            if target.rank > max_rank:
                folder.too_large(
                    f"{target.name} has rank {target.rank}, but max_lora_rank is {max_rank}; raise "
                    "LoRAConfig.max_lora_rank or train the adapter with a smaller r"
                )

    def _add(self, layer: int, module: str) -> None:
        config, name = self._config, self._spec.module_name(layer, module)
        if config.feature_extraction:
            name = name.removeprefix(_INNER)
        if self._spec.is_bare(module):
            targeted = name in config.folded
        else:
            targeted = config.targets(name, linear=module not in EMBEDDING_MODULES)
        if targeted or (self.tied and module == "lm_head"):
            rank, linear = config.rank(name), self._spec.linear(module)
            self.targets[layer, module] = Target(name, module, rank, config.scaling(name, rank), linear)

    def parts(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Part]:
        """Check that keys, shapes, configuration and slots agree, and return each key's part.

        Raises AdapterInvalid.
        """
        if not any(".experts." in key for key in shapes):
            # Names such as gate_proj mean experts' linears only to libraries in which these are modules.
            spec = self._spec
            others = {
                p: t for p, t in self.targets.items() if spec.kind_of(p[1]) == p[1] or spec.is_bare(p[1])
            }
            self.targets = others or self.targets
        parts: dict[str, Part] = {}
        taken: dict[Part, str] = {}
        for key, shape in shapes.items():
            part = self._part(key, shape)
            if part in taken:
                self._folder.invalid_weights(f"{key!r} and {taken[part]!r} are the same weight")
            parts[key], taken[part] = part, key
            if part.is_whole:
                continue
            target = self.targets[part.place]
            expected = target.shape(part.kind)
            if tuple(shape) != expected:
                self._folder.invalid_weights(
                    f"{key!r}: expected shape {list(expected)} (rank {target.rank} of {CONFIG_FILE}, base "
                    f"linear {target.linear.in_features} -> {target.linear.out_features}), found "
                    f"{list(shape[:8])}{'...' if len(shape) > 8 else ''}"
                )
        self._check_complete(taken)
        self.embeddings.check_complete({(part.place[1], part.kind) for part in taken})
        self._check_head(shapes, taken)
        return parts

    def _part(self, key: str, shape: Sequence[int]) -> Part:
        """Return what a tensor is. Raises AdapterInvalid if it does not belong to the adapter."""
        name = WRAPPERS.sub("", key)
        part = self._head(name, key, shape)
        if part is None and (replaced := self.embeddings.find(name, key, shape)):
            part = Part((NO_LAYER, replaced[0]), replaced[1])
        return part or self._lora_part(name, key)

    def _head(self, name: str, key: str, shape: Sequence[int]) -> Part | None:
        match = _HEAD.fullmatch(name)
        if match is None or match[1] not in self._config.heads:
            return None
        hidden = self._spec.hidden_size
        if match[2] == "weight":
            fits = len(shape) == 2 and 1 <= shape[0] <= MAX_LABELS and shape[1] == hidden
        else:
            fits = len(shape) == 1 and 1 <= shape[0] <= MAX_LABELS
        if not fits:
            self._folder.invalid_weights(
                f"{key!r}: expected a head of 1 to {MAX_LABELS} labels over {hidden} hidden units, "
                f"found {list(shape[:8])}"
            )
        return Part((NO_LAYER, match[1]), HEAD_KINDS[match[2] == "bias"])

    def _check_head(self, shapes: Mapping[str, Sequence[int]], taken: Mapping[Part, str]) -> None:
        found = {part: shapes[key][0] for part, key in taken.items() if part.kind in HEAD_KINDS}
        if not self._config.heads and not found:
            return
        kinds = sorted(part.kind for part in found)
        if kinds not in (["head"], ["head", "head_bias"]) or len({part.place for part in found}) != 1:
            self._folder.invalid_weights(
                f"{CONFIG_FILE} has modules_to_save={sorted(self._config.heads)}, and the file "
                "must have the "
                f"weight of one of them; it has {', '.join(taken[part] for part in found) or 'none'}"
            )
        if len(set(found.values())) != 1:
            self._folder.invalid_weights("the head's weight and bias have different numbers of labels")

    def _lora_part(self, name: str, key: str) -> Part:
        layer, module, kind = self._find(name) or self._foreign(key)
        if layer >= self._spec.num_layers:
            self._folder.invalid_weights(
                f"{key!r}: the base model has layers 0..{self._spec.num_layers - 1}; was the adapter "
                "trained on another model?"
            )
        if module not in self._modules:
            self._folder.invalid_weights(
                f"{key!r}: the slots do not hold {module}; they hold {self._kinds(self._modules)}: "
                f"add {module} to LoRAConfig.target_modules"
            )
        if (layer, module) not in self.targets:
            self._folder.invalid_weights(
                f"{key!r}: {CONFIG_FILE} does not target {self._spec.module_name(layer, module)}"
            )
        if kind == "bias" and not self._config.lora_bias:
            self._folder.invalid_weights(f"{key!r}: is a bias, but {CONFIG_FILE} does not set lora_bias")
        if kind == "magnitude" and not self._config.use_dora:
            self._folder.invalid_weights(f"{key!r}: belongs to DoRA, but {CONFIG_FILE} does not set use_dora")
        return Part((layer, module), kind)

    def _find(self, key: str) -> tuple[int, str, str] | None:
        """Find the layer, the module, and the kind of part that a key names."""
        match = _KEY.fullmatch(key)
        place = None if match is None else self._spec.find_module(match[1])
        if match is not None and place is None and self._config.feature_extraction:
            place = self._spec.find_module(_INNER + match[1])
        if match is None or place is None:
            return None
        kinds = _EMBEDDING_KINDS if place[1] == "embed_tokens" else _LINEAR_KINDS
        kind = kinds.get(match[2].replace(".default", "", 1))
        if place[1] in EMBEDDING_MODULES and match[2] == _BASE_WEIGHT:
            kind = "base"
        return None if kind is None else (*place, kind)

    def _kinds(self, modules: Sequence[str]) -> str:
        """Return modules for messages; those that all experts have once."""
        return ", ".join(dict.fromkeys(map(self._spec.kind_of, modules)))

    @property
    def _example(self) -> str:
        """Return the name of a linear, for messages."""
        places = self._spec.adaptable()
        return next((self._spec.module_name(*p) for p in places if p[1] not in EMBEDDING_MODULES), "<linear>")

    def _foreign(self, key: str) -> NoReturn:
        if ".experts." in key and self._spec.impl == "transformers":
            self._folder.invalid_weights(f"{key[:200]!r}: {_OF_EXPERTS}")
        reason = next(
            (reason for part, reason in _FOREIGN_KEYS if part in key),
            f"unknown key; expected keys such as 'base_model.model.{self._example}.lora_<A|B>.weight' with "
            f"a module of {self._kinds(self._spec.targets(None))}",
        )
        self._folder.invalid_weights(f"{key[:200]!r}: {reason}")

    def _check_complete(self, taken: Mapping[Part, str]) -> None:
        needed = ["A", "B"] + ["bias"] * bool(self._config.lora_bias)
        needed += ["magnitude"] * bool(self._config.use_dora)
        for place, target in self.targets.items():
            missing = [kind for kind in needed if Part(place, kind) not in taken]
            if not missing:
                continue
            found = next((key for part, key in taken.items() if part.place == place), None)
            if found is None:
                self._folder.invalid_weights(
                    f"{CONFIG_FILE} targets {target.name}, but the file has no weights for it; save "
                    "the adapter again with PEFT"
                )
            self._folder.invalid_weights(f"{found!r} has no matching {_PART_NAMES[missing[0]]}")
