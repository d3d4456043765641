"""``adapter_config.json``: which linears a PEFT LoRA adapter targets, at which rank and scale.

The matching rules are PEFT's own (``check_target_module_exists``, ``get_pattern_key``), so that an
adapter means here what it means there. A setting that would change the computation in a way this
engine does not perform is refused with its reason; nothing is ignored silently.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any

import msgspec

from aioengine.adapters.peft.folder import invalid_config
from aioengine.adapters.peft.patterns import Pattern, PatternError
from aioengine.model.spec import EMBEDDING_MODULES

ALL_LINEAR = "all-linear"
MAX_PATTERNS = 2048
"""Maximum number of patterns in one field; a model of 126 layers has 882 linears."""
MAX_EXPRESSIONS = 64
"""Maximum number of patterns that are more than a plain module name."""
HEAD_MODULES = ("score", "classifier")
"""Names that transformers gives the head of a model for sequence classification; PEFT names both for every
model."""
MAX_TRAINED_TOKENS = 4096
"""Maximum number of trained tokens of the embeddings, and of the head."""
MAX_INVOCATION = 256
"""Maximum number of invocation tokens of an activated LoRA adapter."""

# Initialisations that train A and B over the unchanged base model. The others (pissa, corda, olora,
# loftq, lora_ga) subtract the initial B @ A from the base weights, which the adapter file does not hold.
# PEFT resets the field to true when it converts such an adapter to plain LoRA on saving.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

MERGE = "merge the adapter into the base model with PEFT's merge_and_unload, and serve that as a model"
_TRAIN = "train a LoRA adapter instead"
_CONVERT = (
    "peft.save_as_lora(path, model, rank=...) makes a LoRA adapter of many others; else merge it into the "
    "base model with PEFT's merge_and_unload, or train a LoRA adapter"
)

_UNSUPPORTED = {
    "layer_replication": f"layer replication changes the base model's depth: {MERGE}",
    "target_parameters": (
        "LoRA on bare parameters is supported only in models with experts, and in those that transformers "
        f"runs: train it with target_modules that name linears, or {MERGE}"
    ),
    "megatron_config": f"Megatron parallel layers are not supported: {MERGE}",
    "use_qalora": f"QA-LoRA pools its inputs, which is not supported: {_TRAIN}",
    "use_bdlora": f"block-diagonal LoRA is not supported: {MERGE}",
    "monteclora_config": f"MonteCLoRA is not supported: {MERGE}",
    "kasa_config": f"KaSA is not supported: {MERGE}",
    "arrow_config": f"Arrow routing is not supported: {_TRAIN}",
}
"""Fields that must have no effect, and the reason."""

# Fields that do not change what the saved A and B compute: provenance, training-only settings, and
# fan_in_fan_out, which tells how the *base* weight is stored (A is [r, in], B [out, r] anyway).
_NEUTRAL = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out"),
    *("inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config"),
)
_IGNORED = {*_NEUTRAL, *_UNSUPPORTED, "peft_type", "bias", "init_lora_weights"}

_Rank = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
_Number = Annotated[float, msgspec.Meta(gt=-1e30, lt=1e30)]
_Tokens = list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]
_Names = str | list[str] | None
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>[0-9]+)\.")


class PeftLoraConfig(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The fields that say what an adapter computes; modules are named as in the base model (``lm_head``)."""

    r: _Rank
    lora_alpha: _Number
    use_rslora: bool | None = None
    use_dora: bool | None = None
    """Whether each adapted module has a magnitude for each output (arXiv:2402.09353)."""
    lora_bias: bool | None = None
    """Whether each B has a bias."""
    ensure_weight_tying: bool | None = None
    """Whether tied embeddings share one adapter."""
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    target_modules: str | list[str]
    """A regular expression for the whole name, a list of names or name endings, or "all-linear"."""
    exclude_modules: _Names = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: _Names = None
    modules_to_save: list[str] | None = None
    alora_invocation_tokens: Annotated[_Tokens, msgspec.Meta(max_length=MAX_INVOCATION)] | None = None
    """Activated LoRA (arXiv:2504.12397): the adapter applies from these tokens on; none: to all tokens."""
    trainable_token_indices: _Tokens | dict[str, _Tokens] | None = None
    task_type: str | None = None

    folded: dict[str, tuple[int, float]] = {}
    """Rank and scaling of the modules whose A and B are made from other tensors. Not from the file."""

    def on(self, modules: Iterable[str]) -> PeftLoraConfig:
        """Return the configuration with ``modules``, by their full names, as its targets."""
        return msgspec.structs.replace(
            self,
            target_modules=list(modules),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )

    # What is trained beside LoRA

    @property
    def heads(self) -> frozenset[str]:
        """Possible names of the head that the file has; empty: no head."""
        return frozenset(self.modules_to_save or ()) - self.saved

    @property
    def saved(self) -> frozenset[str]:
        """Names or endings of the names of embeddings and heads that the file has as a whole."""
        names = self.modules_to_save or ()
        return frozenset(name for name in names if name.rpartition(".")[2] in EMBEDDING_MODULES)

    @property
    def tokens(self) -> Mapping[str, list[int]]:
        """Trained tokens: the name or the ending of the name of an embedding or a head, and the tokens whose
        rows the file has, in its order."""
        found = self.trainable_token_indices or {}
        by_name = {EMBEDDING_MODULES[0]: found} if isinstance(found, list) else found
        return {name: ids for name, ids in by_name.items() if ids}

    @property
    def feature_extraction(self) -> bool:
        """Whether it was trained on the model without its head. Modules' names then have no "model." in
        front."""
        return self.task_type == "FEATURE_EXTRACTION"

    # Which modules, and how

    @cached_property
    def unmatched(self) -> str:
        """A regular expression that chooses modules and that RE2 does not take, with the reason: the file's
        tensors say which modules the adapter is on. "" if there is none."""
        try:
            _ = self._targets, self._excluded, self._layer_patterns
        except PatternError as error:
            return str(error)
        return ""

    def targets(self, module: str, *, linear: bool = True) -> bool:
        """Whether the configuration puts an adapter on ``module``. It is a ``linear``, or else an embedding
        or the head, which "all-linear" leaves out."""
        if module in self.folded:
            return True
        excluded, targets = self._excluded, self._targets
        if excluded.matches(module) if isinstance(excluded, Pattern) else named_by(module, excluded):
            return False
        if targets is None:
            return linear
        if isinstance(targets, Pattern):
            return targets.matches(module)
        if module in targets:
            return True  # a full name is not subject to layers_to_transform
        return named_by(module, targets) and self._in_layers(module)

    def rank(self, module: str) -> int:
        if module in self.folded:
            return self.folded[module][0]
        return int(self._override(0, module, self.r))

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        if module in self.folded:
            return self.folded[module][1]
        alpha = self._override(1, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _in_layers(self, module: str) -> bool:
        layers = self.layers_to_transform
        if not layers and layers != 0:
            return True
        index = _LAYER_INDEX.match(module)
        if index is None or int(index["idx"]) not in ([layers] if isinstance(layers, int) else layers):
            return False
        # A name has only one number in it, so any number that a pattern finds is the layer's.
        patterns = self._layer_patterns
        return not patterns or any(pattern.matches(module) for pattern in patterns)

    # Patterns, each compiled once; these raise PatternError

    @cached_property
    def _targets(self) -> Pattern | frozenset[str] | None:
        """None: every linear of the layers."""
        chosen = self.target_modules
        if isinstance(chosen, str) and chosen.lower() == ALL_LINEAR:
            return None
        return _modules("target_modules", chosen)

    @cached_property
    def _excluded(self) -> Pattern | frozenset[str]:
        return _modules("exclude_modules", self.exclude_modules or [])

    @cached_property
    def _layer_patterns(self) -> list[Pattern]:
        chosen = self.layers_pattern or []
        texts = [chosen] if isinstance(chosen, str) else chosen
        return _patterns("layers_pattern", texts, r"(?:^|.*?\.)", r"\.(?:[0-9]+)\.")

    @cached_property
    def overrides(self) -> list[list[tuple[Pattern, float]]]:
        """PEFT's ranks and alphas of single modules; the first key, in file order, that matches a module
        wins."""
        return [
            list(zip(_patterns(field, values or {}, r"(.*\.)?(", ")$"), (values or {}).values(), strict=True))
            for field, values in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
        ]

    def _override(self, number: int, module: str, otherwise: float) -> float:
        return next((v for pattern, v in self.overrides[number] if pattern.matches(module)), otherwise)


_FIELDS = frozenset(PeftLoraConfig.__struct_fields__) - {"folded"}


def named_by(module: str, names: Collection[str]) -> bool:
    """Whether one of ``names`` is the module's name or a dotted ending of it."""
    while module not in names:
        _, dot, module = module.partition(".")
        if not dot:
            return False
    return True


def _modules(field: str, chosen: str | list[str]) -> Pattern | frozenset[str]:
    if isinstance(chosen, str):
        return _pattern(field, chosen, whole=True)
    return frozenset(chosen)


def _patterns(field: str, texts: Collection[str], before: str, after: str) -> list[Pattern]:
    """Compile expressions, of which there may be a bounded number: each is matched against each module."""
    patterns = []
    if len(texts) <= MAX_PATTERNS:
        patterns = [_pattern(field, text, before=before, after=after) for text in texts]
    if len(texts) > MAX_PATTERNS or sum(not pattern.plain for pattern in patterns) > MAX_EXPRESSIONS:
        raise PatternError(
            f"{field}: more than {MAX_PATTERNS} patterns, or {MAX_EXPRESSIONS} that are more than a name"
        )
    return patterns


def _pattern(field: str, text: str, *, before: str = "", after: str = "", whole: bool = False) -> Pattern:
    """Compile an expression; a PatternError names it and its field."""
    try:
        return Pattern(text, before=before, after=after, whole=whole)
    except PatternError as error:
        raise PatternError(f"{field}: RE2 does not take the expression {short(text)} ({error})") from error


def fields_of(text: bytes) -> dict[str, Any]:
    """Return the fields of ``adapter_config.json``. Raises AdapterInvalid if it is no JSON object."""
    try:
        return msgspec.json.decode(text.removeprefix(b"\xef\xbb\xbf"), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        invalid_config(f"not a JSON object: {error}")


def parse_config(fields: Mapping[str, Any]) -> PeftLoraConfig:
    """Validate the fields of ``adapter_config.json``. Raises AdapterInvalid for anything malformed or not
    supported."""
    _refuse_unsupported(fields, _FIELDS)
    known = {name: value for name, value in fields.items() if name in _FIELDS}
    try:
        config = msgspec.convert(known, PeftLoraConfig)
        _ = config.overrides
    except PatternError as error:
        invalid_config(f"{error}; name the modules instead")
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        where = re.search(r"\$\.(\w+)|field `(\w+)`", str(error))
        name = (where[1] or where[2]) if where else ""
        invalid_config(f"{name}={short(fields.get(name))}: {error}; save the adapter with PEFT again")
    heads, trained = short(config.modules_to_save), bool(config.tokens or config.saved)
    layers, invoked = config.layers_to_transform, bool(config.alora_invocation_tokens)
    for refused, reason in (
        (
            isinstance(config.target_modules, str) and (layers is not None or config.layers_pattern),
            "layers_to_transform and layers_pattern need target_modules to be a list, not a str",
        ),
        (config.layers_pattern and layers is None, "layers_pattern without layers_to_transform"),
        (config.use_dora and config.lora_bias, "use_dora and lora_bias together have no meaning in PEFT"),
        (
            not config.heads <= set(HEAD_MODULES),
            f"modules_to_save={heads}: only a classification head ({' or '.join(HEAD_MODULES)}), "
            f"{' and '.join(EMBEDDING_MODULES)} can be swapped: train without other modules, or {MERGE}",
        ),
        (
            invoked and config.use_dora,
            "alora_invocation_tokens and use_dora together have no meaning in PEFT",
        ),
        (
            invoked and trained,
            f"alora_invocation_tokens with trainable_token_indices or modules_to_save={heads}: PEFT applies "
            "trained embeddings to all tokens, before the invocation, too; train it without them",
        ),
    ):
        if refused:
            invalid_config(reason)
    for name, ids in config.tokens.items():
        field = f"trainable_token_indices[{name[:80]!r}]"
        if name.rpartition(".")[2] not in EMBEDDING_MODULES:
            invalid_config(f"{field}: only rows of {' and '.join(EMBEDDING_MODULES)} can be swapped: {MERGE}")
        if len(ids) > MAX_TRAINED_TOKENS:
            invalid_config(f"{field}: {len(ids)} tokens, more than {MAX_TRAINED_TOKENS}: {MERGE}")
        if len(set(ids)) != len(ids):
            twice = next(item for at, item in enumerate(ids) if item in ids[:at])
            invalid_config(f"{field}: token {twice} is there twice; save the adapter again with PEFT")
    return config


def _refuse_unsupported(fields: Mapping[str, Any], used: Collection[str]) -> None:
    """Raise AdapterInvalid for what would change the computation in a way that this engine does not perform.
    ``used`` are the names of the fields that are read elsewhere."""
    peft_type, bias, init = map(fields.get, ("peft_type", "bias", "init_lora_weights"))
    if not isinstance(peft_type, str):
        invalid_config(f"peft_type={short(peft_type)}: expected 'LORA'; save the adapter with PEFT again")
    if peft_type != "LORA":
        invalid_config(
            f"peft_type={short(peft_type)}: only 'LORA' and methods that can be folded into it are "
            f"supported: {_CONVERT}"
        )
    for field, reason in _UNSUPPORTED.items():
        if fields.get(field):
            invalid_config(f"{field}={short(fields[field])}: {reason}")
    if bias not in (None, "none"):
        invalid_config(
            f"bias={short(bias)}: only 'none' is supported; trained biases cannot be swapped: {MERGE}"
        )
    if init is not None and not isinstance(init, bool) and init not in _PLAIN_INITS:
        invalid_config(
            f"init_lora_weights={short(init)}: expected a bool or one of {list(_PLAIN_INITS)}; "
            "other initialisations change the base model's weights, so that A and B alone are not "
            "the whole adapter: save it with PEFT's path_initial_model_for_weight_conversion, or set this to "
            "true if the served base model is the changed one (LoftQ: model.unload().save_pretrained)"
        )
    for field, value in fields.items():
        if field not in _IGNORED and field not in used and value:  # null, false, 0 and empty ones do nothing
            invalid_config(
                f"unknown field {field[:80]!r} = {short(value)} may change what the adapter "
                "computes; remove it if it is only a note"
            )


def short(value: object) -> str:
    """Return a value as JSON, cut to 80 characters, for messages."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
