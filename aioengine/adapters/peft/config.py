"""``adapter_config.json``: which linears a PEFT LoRA adapter targets, at which rank and scale.

The matching rules are PEFT's own (``check_target_module_exists``, ``get_pattern_key``), so that an
adapter means here what it means there. A setting that would change the computation in a way this
engine does not perform is refused with its reason; nothing is ignored silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

import msgspec

from aioengine.adapters.peft.folder import AdapterFolder
from aioengine.adapters.peft.patterns import Pattern, PatternError
from aioengine.adapters.peft.unsupported import MERGE, Invalid, refuse_unsupported, short
from aioengine.model.spec import EMBEDDING_MODULES

ALL_LINEAR = "all-linear"
MAX_PATTERNS = 2048
"""Maximum number of patterns in one field; a model of 126 layers has 882 linears."""
HEAD_MODULES = ("score", "classifier")
"""Names that transformers gives the head of a model for sequence classification; PEFT names both for every
model."""
MAX_TRAINED_TOKENS = 4096
"""Maximum number of trained tokens of the embeddings, and of the head."""
MAX_INVOCATION = 256
"""Maximum number of invocation tokens of an activated LoRA adapter."""
MAX_EXPRESSIONS = 64
"""Maximum number of patterns that are more than a plain module name."""

_Rank = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
_Number = Annotated[float, msgspec.Meta(gt=-1e30, lt=1e30)]
_Tokens = list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]
_Flag = (bool | None, "true or false")
_Names = (list[str] | None, "a list of names")
_NamesOrPattern = (str | list[str] | None, f"a list of names, a regular expression or {ALL_LINEAR!r}")
_FIELDS: Mapping[str, tuple[Any, str]] = {
    "r": (_Rank, "a positive integer (the rank)"),
    "lora_alpha": (_Number, "a finite number"),
    "use_rslora": _Flag,
    "use_dora": _Flag,
    "lora_bias": _Flag,
    "ensure_weight_tying": _Flag,
    "rank_pattern": (dict[str, _Rank] | None, "an object of module pattern -> positive integer"),
    "alpha_pattern": (dict[str, _Number] | None, "an object of module pattern -> finite number"),
    "target_modules": _NamesOrPattern,
    "exclude_modules": _NamesOrPattern,
    "layers_to_transform": (int | list[int] | None, "an integer or a list of integers"),
    "layers_pattern": (str | list[str] | None, "a name or a list of names"),
    "modules_to_save": _Names,
    "alora_invocation_tokens": (_Tokens | None, "a list of token ids"),
    "trainable_token_indices": (
        _Tokens | dict[str, _Tokens] | None,
        "a list of token ids, or an object of module -> such a list",
    ),
    "task_type": (str | None, "a text"),
}
"""Each field that says what an adapter computes: its type, and that in words. A missing one is null."""
_DECODERS = {name: msgspec.json.Decoder(type_) for name, (type_, _) in _FIELDS.items()}
_NULL = msgspec.Raw(b"null")
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>[0-9]+)\.")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
    """A validated LoRA configuration; modules are named as in the base model (``lm_head``)."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_patterns: tuple[tuple[Pattern, int], ...]
    alpha_patterns: tuple[tuple[Pattern, float], ...]
    target_modules: Pattern | frozenset[str] | None
    """A regular expression for the whole name, a list of names or name endings, or None for every linear of
    the layers."""
    exclude_modules: Pattern | frozenset[str]
    layers: frozenset[int]
    """The layers that ``target_modules`` is limited to; empty = all."""
    layer_patterns: tuple[Pattern, ...]
    use_dora: bool
    """Whether each adapted module has a magnitude for each output (arXiv:2402.09353)."""
    lora_bias: bool
    """Each B has a bias."""
    ensure_weight_tying: bool
    """Whether tied embeddings share one adapter."""
    heads: frozenset[str]
    """Possible names of the head that the file has; empty: no head."""
    feature_extraction: bool
    """Whether it was trained on the model without its head. Modules' names then have no "model." in front."""
    invocation: tuple[int, ...]
    """Activated LoRA (arXiv:2504.12397): the adapter applies from these tokens on; none: to all tokens."""
    tokens: tuple[tuple[str, tuple[int, ...]], ...]
    """Trained tokens: the name or the ending of the name of an embedding or a head, and the tokens whose rows
    the file has, in its order."""
    saved: frozenset[str]
    """Names or endings of the names of embeddings and heads that the file has as a whole."""
    unmatched: str
    """A regular expression that chooses modules and that RE2 does not take, with the reason: the file's
    tensors say which modules the adapter is on. "" if there is none."""
    folded: Mapping[str, tuple[int, float]] = field(default_factory=dict, hash=False)
    """Rank and scaling of the modules whose A and B are made from other tensors."""

    def on(self, modules: Set[str]) -> PeftLoraConfig:
        """Return the configuration with ``modules``, by their full names, as its targets."""
        return replace(
            self,
            target_modules=frozenset(modules),
            exclude_modules=frozenset(),
            layers=frozenset(),
            layer_patterns=(),
            unmatched="",
        )

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the trained tokens of a module."""
        return next((ids for name, ids in self.tokens if named_by(module, (name,))), ())

    def saves(self, module: str) -> bool:
        """Whether the configuration says that the file has the whole module."""
        return named_by(module, self.saved)

    def targets(self, module: str, *, linear: bool = True) -> bool:
        """Whether the configuration puts an adapter on ``module``. It is a ``linear``, or else an embedding
        or the head, which "all-linear" leaves out."""
        if module in self.folded:
            return True
        excluded = self.exclude_modules
        if isinstance(excluded, Pattern):
            if excluded.matches(module):
                return False
        elif named_by(module, excluded):
            return False
        if self.target_modules is None:
            return linear
        if isinstance(self.target_modules, Pattern):
            return self.target_modules.matches(module)
        if module in self.target_modules:
            return True  # a full name is not subject to layers_to_transform
        return named_by(module, self.target_modules) and self._in_layers(module)

    @property
    def max_rank(self) -> int:
        """Largest rank of a module."""
        return max(self.r, *(rank for _, rank in self.rank_patterns), 1)

    def rank(self, module: str) -> int:
        if module in self.folded:
            return self.folded[module][0]
        return next((r for pattern, r in self.rank_patterns if pattern.matches(module)), self.r)

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        if module in self.folded:
            return self.folded[module][1]
        matches = (alpha for pattern, alpha in self.alpha_patterns if pattern.matches(module))
        alpha = next(matches, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        index = _LAYER_INDEX.match(module)
        if index is None or int(index["idx"]) not in self.layers:
            return False
        # A name has only one number in it, so any number that a pattern finds is the layer's.
        return not self.layer_patterns or any(pattern.matches(module) for pattern in self.layer_patterns)


def named_by(module: str, names: Container[str]) -> bool:
    """Whether one of ``names`` is the module's name or a dotted ending of it."""
    while module not in names:
        _, dot, module = module.partition(".")
        if not dot:
            return False
    return True


def fields_of(text: bytes, folder: AdapterFolder) -> dict[str, msgspec.Raw]:
    """Return the fields of ``adapter_config.json``. Raises AdapterInvalid if it is no JSON object."""
    try:
        return msgspec.json.decode(text.removeprefix(b"\xef\xbb\xbf"), type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        folder.invalid_config(f"not a JSON object: {error}")


def parse_config(fields: Mapping[str, msgspec.Raw], folder: AdapterFolder) -> PeftLoraConfig:
    """Validate the fields of ``adapter_config.json``.

    Raises :class:`~aioengine.errors.AdapterInvalid` for anything malformed or not supported.
    """
    invalid = folder.invalid_config
    refuse_unsupported(fields, _FIELDS.keys(), invalid)
    raw = {field: _decoded(field, fields.get(field, _NULL), invalid) for field in _FIELDS}
    target, layers, patterns = raw["target_modules"], raw["layers_to_transform"], raw["layers_pattern"]
    if isinstance(target, str) and (layers is not None or patterns):
        invalid("layers_to_transform and layers_pattern need target_modules to be a list, not a str")
    if patterns and layers is None:
        invalid("layers_pattern without layers_to_transform")
    if target is None:
        invalid(
            f"target_modules=null: expected {_FIELDS['target_modules'][1]}: save the adapter with PEFT again"
        )
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        target = None
    try:
        targets, excluded = (
            _modules("target_modules", target),
            _modules("exclude_modules", raw["exclude_modules"]),
        )
        chosen = _bounded("layers_pattern", _layer_patterns(patterns), invalid)
        unmatched = ""
    except PatternError as error:
        targets, excluded, chosen, unmatched = None, None, (), str(error)
    if raw["use_dora"] and raw["lora_bias"]:
        invalid("use_dora and lora_bias together have no meaning in PEFT")
    heads, saved = _saved(raw["modules_to_save"], invalid)
    tokens = _tokens(raw["trainable_token_indices"], invalid)
    invocation = tuple(raw["alora_invocation_tokens"] or ())
    if len(invocation) > MAX_INVOCATION:
        invalid(f"alora_invocation_tokens: {len(invocation)} tokens, more than {MAX_INVOCATION}")
    if invocation and raw["use_dora"]:
        invalid("alora_invocation_tokens and use_dora together have no meaning in PEFT")
    for key, trained in (("trainable_token_indices", tokens), ("modules_to_save", saved)):
        if invocation and trained:
            invalid(
                f"alora_invocation_tokens with {key}={short(raw[key])}: PEFT applies trained embeddings "
                "to all tokens, before the invocation, too; train it without them"
            )
    return PeftLoraConfig(
        r=raw["r"],
        lora_alpha=raw["lora_alpha"],
        use_rslora=bool(raw["use_rslora"]),
        rank_patterns=_patterns("rank_pattern", raw["rank_pattern"] or {}, invalid),
        alpha_patterns=_patterns("alpha_pattern", raw["alpha_pattern"] or {}, invalid),
        target_modules=targets,
        exclude_modules=excluded or frozenset(),
        layers=frozenset([layers] if isinstance(layers, int) else layers or ()),
        layer_patterns=chosen,
        use_dora=bool(raw["use_dora"]),
        lora_bias=bool(raw["lora_bias"]),
        ensure_weight_tying=bool(raw["ensure_weight_tying"]),
        heads=heads,
        feature_extraction=raw["task_type"] == "FEATURE_EXTRACTION",
        invocation=invocation,
        tokens=tokens,
        saved=saved,
        unmatched=unmatched,
    )


def _decoded(field: str, text: msgspec.Raw, invalid: Invalid) -> Any:
    """Decode a field. What is of another type is refused without building objects of it, because building
    them would hold the interpreter lock."""
    try:
        return _DECODERS[field].decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        invalid(f"{field}={short(text)}: expected {_FIELDS[field][1]}")


def _saved(value: Sequence[str] | None, invalid: Invalid) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of a classification head, and those of embeddings and the model's head."""
    names = frozenset(value or ())
    embeddings = frozenset(name for name in names if name.rpartition(".")[2] in EMBEDDING_MODULES)
    heads = names - embeddings
    if not heads <= set(HEAD_MODULES):
        invalid(
            f"modules_to_save={short(value)}: only a classification head ({' or '.join(HEAD_MODULES)}), "
            f"{' and '.join(EMBEDDING_MODULES)} can be swapped: train without other modules, or " + MERGE
        )
    return heads, embeddings


def _tokens(
    value: list[int] | Mapping[str, list[int]] | None, invalid: Invalid
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    by_name = {EMBEDDING_MODULES[0]: value} if isinstance(value, list) else value or {}
    for name, ids in by_name.items():
        where = f"trainable_token_indices[{name[:80]!r}]"
        if name.rpartition(".")[2] not in EMBEDDING_MODULES:
            invalid(f"{where}: only rows of {' and '.join(EMBEDDING_MODULES)} can be swapped: {MERGE}")
        if len(ids) > MAX_TRAINED_TOKENS:
            invalid(f"{where}: {len(ids)} tokens, more than {MAX_TRAINED_TOKENS}: {MERGE}")
        if len(set(ids)) != len(ids):
            twice = next(item for at, item in enumerate(ids) if item in ids[:at])
            invalid(f"{where}: token {twice} is there twice; save the adapter again with PEFT")
    return tuple((name, tuple(ids)) for name, ids in by_name.items() if ids)


def _bounded(field: str, patterns: Sequence[Pattern], invalid: Invalid) -> tuple[Pattern, ...]:
    """Check the number of patterns: each is matched against each module."""
    if len(patterns) > MAX_PATTERNS or sum(not pattern.plain for pattern in patterns) > MAX_EXPRESSIONS:
        invalid(f"{field}: more than {MAX_PATTERNS} patterns, or {MAX_EXPRESSIONS} that are more than a name")
    return tuple(patterns)


def _pattern(field: str, text: str, *, before: str = "", after: str = "", whole: bool = False) -> Pattern:
    """Compile an expression; a PatternError names it and its field."""
    try:
        return Pattern(text, before=before, after=after, whole=whole)
    except PatternError as error:
        raise PatternError(f"{field}: RE2 does not take the expression {short(text)} ({error})") from error


def _modules(field: str, value: str | Sequence[str] | None) -> Pattern | frozenset[str] | None:
    """Parse module names, or an expression. Raises PatternError."""
    if isinstance(value, str):
        return _pattern(field, value, whole=True)
    return None if value is None else frozenset(value)


def _layer_patterns(value: str | Sequence[str] | None) -> list[Pattern]:
    """Parse ``layers_pattern``. Raises PatternError."""
    texts = [value] if isinstance(value, str) else value or []
    before, after = r"(?:^|.*?\.)", r"\.(?:[0-9]+)\."
    return [
        _pattern("layers_pattern", text, before=before, after=after) for text in texts[: MAX_PATTERNS + 1]
    ]


def _patterns(field: str, values: Mapping[str, T], invalid: Invalid) -> tuple[tuple[Pattern, T], ...]:
    """Parse PEFT's per-module overrides; the first key, in file order, that matches a module wins."""
    keys = list(values)[: MAX_PATTERNS + 1]
    try:
        patterns = [_pattern(field, key, before=r"(.*\.)?(", after=")$") for key in keys]
    except PatternError as error:
        invalid(f"{error}; name the modules instead")
    return tuple(zip(_bounded(field, patterns, invalid), values.values(), strict=True))
