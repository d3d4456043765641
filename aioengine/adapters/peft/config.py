"""``adapter_config.json``: which linears a PEFT LoRA adapter targets, at which rank and scale.

The matching rules are PEFT's own (``check_target_module_exists``, ``get_pattern_key``), so that an
adapter means here what it means there. A setting that would change the computation in a way this
engine does not perform is refused with its reason; nothing is ignored silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import msgspec

from aioengine.adapters.peft.folder import CONFIG_FILE
from aioengine.adapters.peft.patterns import Pattern, PatternError
from aioengine.adapters.peft.unsupported import MERGE, Invalid, refuse_unsupported, short
from aioengine.errors import AdapterInvalid
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

_USED = frozenset(
    (
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "lora_bias",
        "use_dora",
        "ensure_weight_tying",
        "init_lora_weights",
        "modules_to_save",
        "task_type",
        "alora_invocation_tokens",
        "trainable_token_indices",
    )
)

_Scalar = str | int | float | bool | None
_VALUE: msgspec.json.Decoder[object] = msgspec.json.Decoder(
    _Scalar | list[_Scalar] | dict[str, _Scalar | list[_Scalar]]
)
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>[0-9]+)\.")


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

    def folds(self, module: str) -> bool:
        """Whether it was made from a bare parameter that has ``module`` in it."""
        return False

    @property
    def max_rank(self) -> int:
        """Largest rank of a module."""
        return max(self.r, *(rank for _, rank in self.rank_patterns), 1)

    def rank(self, module: str) -> int:
        return next((r for pattern, r in self.rank_patterns if pattern.matches(module)), self.r)

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
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


def parse_config(data: bytes, *, name: str, path: str) -> PeftLoraConfig:
    """Validate the content of ``adapter_config.json``.

    Raises :class:`~aioengine.errors.AdapterInvalid` for anything malformed or not supported.
    """

    def invalid(reason: str) -> NoReturn:
        raise AdapterInvalid(f"{CONFIG_FILE}: {reason}", name=name, path=path)

    try:
        fields = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        invalid("expected a JSON object")
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise AdapterInvalid(f"{CONFIG_FILE}: not valid JSON: {error}", name=name, path=path) from error
    raw = {field: _decoded(field, fields[field], invalid) for field in _USED if field in fields}
    refuse_unsupported(raw, fields, _USED, invalid)

    target, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    patterns = raw.get("layers_pattern") or []
    if isinstance(target, str) and (layers is not None or patterns):
        invalid("layers_to_transform and layers_pattern need target_modules to be a list, not a str")
    if patterns and layers is None:
        invalid("layers_pattern without layers_to_transform")
    layer_patterns = [patterns] if isinstance(patterns, str) else patterns
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        target = None
    elif target is None:
        invalid(
            "target_modules is missing; expected a list of names, a regex or "
            f"{ALL_LINEAR!r}: save the adapter with PEFT again"
        )
    try:
        targets = None if target is None else _modules("target_modules", target, invalid)
        excluded = _modules("exclude_modules", raw.get("exclude_modules") or [], invalid)
        chosen = _layer_patterns(layer_patterns, invalid)
        unmatched = ""
    except PatternError as error:
        targets, excluded, chosen, unmatched = None, frozenset(), (), str(error)
    use_dora = _bool("use_dora", raw.get("use_dora"), invalid)
    lora_bias = _bool("lora_bias", raw.get("lora_bias"), invalid)
    if use_dora and lora_bias:
        invalid("use_dora and lora_bias together have no meaning in PEFT")
    heads, saved = _saved(raw.get("modules_to_save"), invalid)
    tokens = _tokens(raw.get("trainable_token_indices"), invalid)
    for field in ("trainable_token_indices",) * bool(tokens) + ("modules_to_save",) * bool(saved):
        if raw.get("alora_invocation_tokens"):
            invalid(
                f"alora_invocation_tokens with {field}={short(raw[field])}: PEFT applies trained embeddings "
                "to all tokens, before the invocation, too; train it without them"
            )
    return PeftLoraConfig(
        r=_rank("r", raw.get("r"), invalid),
        lora_alpha=_number("lora_alpha", raw.get("lora_alpha"), invalid),
        use_rslora=_bool("use_rslora", raw.get("use_rslora"), invalid),
        rank_patterns=_patterns("rank_pattern", raw.get("rank_pattern"), _rank, invalid),
        alpha_patterns=_patterns("alpha_pattern", raw.get("alpha_pattern"), _number, invalid),
        target_modules=targets,
        exclude_modules=excluded,
        layers=_layers(layers, invalid),
        layer_patterns=chosen,
        use_dora=use_dora,
        lora_bias=lora_bias,
        ensure_weight_tying=_bool("ensure_weight_tying", raw.get("ensure_weight_tying"), invalid),
        heads=heads,
        feature_extraction=raw.get("task_type") == "FEATURE_EXTRACTION",
        invocation=_invocation(raw, invalid),
        tokens=tokens,
        saved=saved,
        unmatched=unmatched,
    )


def _invocation(raw: Mapping[str, object], invalid: Invalid) -> tuple[int, ...]:
    field, tokens = "alora_invocation_tokens", raw.get("alora_invocation_tokens") or []
    if not isinstance(tokens, list) or not all(type(item) is int and 0 <= item < 2**20 for item in tokens):
        invalid(f"{field}={short(tokens)}: expected a list of token ids")
    if len(tokens) > MAX_INVOCATION:
        invalid(f"{field}: {len(tokens)} tokens, more than {MAX_INVOCATION}")
    if tokens and raw.get("use_dora"):
        invalid(f"{field} and use_dora together have no meaning in PEFT")
    return tuple(tokens)


T = TypeVar("T")


def _decoded(field: str, text: msgspec.Raw, invalid: Invalid) -> object:
    """Type of any field that PEFT writes. Deeper nesting and unused fields are skipped without building
    objects, because building them would hold the interpreter lock."""
    try:
        return _VALUE.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        invalid(f"{field}={short(text)}: {error}")


def _saved(value: object, invalid: Invalid) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of a classification head, and those of embeddings and the model's head."""
    names = frozenset(_strings("modules_to_save", value or [], invalid))
    embeddings = frozenset(name for name in names if name.rpartition(".")[2] in EMBEDDING_MODULES)
    heads = names - embeddings
    if not heads <= set(HEAD_MODULES):
        invalid(
            f"modules_to_save={short(value)}: only a classification head ({' or '.join(HEAD_MODULES)}), "
            f"{' and '.join(EMBEDDING_MODULES)} can be swapped: train without other modules, or " + MERGE
        )
    return heads, embeddings


def _tokens(value: object, invalid: Invalid) -> tuple[tuple[str, tuple[int, ...]], ...]:
    field = "trainable_token_indices"
    if isinstance(value, list):
        value = {EMBEDDING_MODULES[0]: value}
    if not isinstance(value, dict) and value is not None:
        invalid(
            f"{field}={short(value)}: expected a list of token ids, or an object of module -> such a list"
        )
    found = []
    for name, ids in (value or {}).items():
        where = f"{field}[{name[:80]!r}]"
        if name.rpartition(".")[2] not in EMBEDDING_MODULES:
            invalid(f"{where}: only rows of {' and '.join(EMBEDDING_MODULES)} can be swapped: {MERGE}")
        if not isinstance(ids, list) or not all(type(item) is int and 0 <= item < 2**31 for item in ids):
            invalid(f"{where}={short(ids)}: expected a list of token ids")
        if len(ids) > MAX_TRAINED_TOKENS:
            invalid(f"{where}: {len(ids)} tokens, more than {MAX_TRAINED_TOKENS}: {MERGE}")
        if len(set(ids)) != len(ids):
            twice = next(item for at, item in enumerate(ids) if item in ids[:at])
            invalid(f"{where}: token {twice} is there twice; save the adapter again with PEFT")
        if ids:
            found.append((name, tuple(ids)))
    return tuple(found)


def _rank(field: str, value: object, invalid: Invalid) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        invalid(f"{field}={short(value)}: expected a positive integer (the rank)")
    return value


def _number(field: str, value: object, invalid: Invalid) -> float:
    # Bounded rather than math.isfinite, which overflows on JSON's unbounded integers.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e30 < value < 1e30:
        invalid(f"{field}={short(value)}: expected a finite number")
    return float(value)


def _bool(field: str, value: object, invalid: Invalid) -> bool:
    if value is not None and not isinstance(value, bool):
        invalid(f"{field}={short(value)}: expected true or false")
    return bool(value)


def _strings(field: str, value: object, invalid: Invalid) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        invalid(f"{field}={short(value)}: expected a list of strings")
    return value


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


def _modules(field: str, value: object, invalid: Invalid) -> Pattern | frozenset[str]:
    """Parse module names, or an expression. Raises PatternError."""
    if isinstance(value, str):
        return _pattern(field, value, whole=True)
    return frozenset(_strings(field, value, invalid))


def _layer_patterns(value: object, invalid: Invalid) -> tuple[Pattern, ...]:
    """Parse ``layers_pattern``. Raises PatternError."""
    field = "layers_pattern"
    texts = _strings(field, value, invalid)[: MAX_PATTERNS + 1]
    found = [_pattern(field, text, before=r"(?:^|.*?\.)", after=r"\.(?:[0-9]+)\.") for text in texts]
    return _bounded(field, found, invalid)


def _layers(value: object, invalid: Invalid) -> frozenset[int]:
    items = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        invalid(f"layers_to_transform={short(value)}: expected an integer or a list of integers")
    return frozenset(items)


def _patterns(
    field: str, value: object, check: Callable[[str, object, Invalid], T], invalid: Invalid
) -> tuple[tuple[Pattern, T], ...]:
    """PEFT's per-module overrides; the first key, in file order, that matches a module wins."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        invalid(f"{field}={short(value)}: expected an object of module pattern -> value")
    keys = list(value)[: MAX_PATTERNS + 1]
    try:
        patterns = [_pattern(field, key, before=r"(.*\.)?(", after=")$") for key in keys]
    except PatternError as error:
        invalid(f"{error}; name the modules instead")
    return tuple(
        (pattern, check(f"{field}[{key[:80]!r}]", value[key], invalid))
        for key, pattern in zip(keys, _bounded(field, patterns, invalid), strict=True)
    )
