"""``adapter_config.json``: which linears a PEFT LoRA adapter targets, at which rank and scale.

The matching rules are PEFT's own (``check_target_module_exists``, ``get_pattern_key``), so that an
adapter means here what it means there. A setting that would change the computation in a way this
engine does not perform is refused with its reason; nothing is ignored silently.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from aioengine.adapters.peft.folder import CONFIG_FILE
from aioengine.errors import AdapterInvalid

ALL_LINEAR = "all-linear"

# Initialisations that train A and B over the unchanged base model. The others (pissa, corda, olora,
# loftq, lora_ga) subtract their start from the base weights, which the adapter file does not carry.
# PEFT resets the field to true when it converts such an adapter to plain LoRA on saving.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

_UNSUPPORTED = {
    "modules_to_save": "fully trained modules are not supported; only LoRA weights can be swapped",
    "layer_replication": "layer replication changes the base model's depth",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "target_parameters": "LoRA on bare parameters (expert weights) is not supported",
    "megatron_config": "Megatron parallel layers are not supported",
    "use_qalora": "QA-LoRA pools its inputs, which is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "kasa_config": "KaSA is not supported",
    "arrow_config": "Arrow routing is not supported",
}

# Fields that do not change what the saved A and B compute: provenance, training-only settings, and
# fan_in_fan_out, which tells how the *base* weight is stored (A is [r, in], B [out, r] anyway).
_NEUTRAL = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    )
)
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
    )
)

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>[0-9]+)\.")


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
    """A validated LoRA configuration; modules are named as in the base model (``lm_head``)."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_patterns: tuple[tuple[re.Pattern[str], int], ...]
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...]
    target_modules: re.Pattern[str] | frozenset[str] | None
    """A regex for the whole name, names or name endings, or None: every linear of the layers."""
    exclude_modules: re.Pattern[str] | frozenset[str]
    layers: frozenset[int]
    """The layers that ``target_modules`` is limited to; empty = all."""
    layer_patterns: tuple[re.Pattern[str], ...]
    use_dora: bool
    """Each adapted module has a magnitude per output (arXiv:2402.09353)."""
    lora_bias: bool
    """Each B has a bias."""
    ensure_weight_tying: bool
    """Embeddings that are tied get one adapter."""

    def targets(self, module: str) -> bool:
        """Whether the configuration puts an adapter on the linear called ``module``."""
        excluded = self.exclude_modules
        if isinstance(excluded, re.Pattern):
            if excluded.fullmatch(module):
                return False
        elif _named_by(module, excluded):
            return False
        if self.target_modules is None:
            return module.startswith("model.layers.")
        if isinstance(self.target_modules, re.Pattern):
            return self.target_modules.fullmatch(module) is not None
        if module in self.target_modules:
            return True  # a full name is not subject to layers_to_transform
        return _named_by(module, self.target_modules) and self._in_layers(module)

    def rank(self, module: str) -> int:
        return next((r for pattern, r in self.rank_patterns if pattern.match(module)), self.r)

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        matches = (alpha for pattern, alpha in self.alpha_patterns if pattern.match(module))
        alpha = next(matches, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        patterns = self.layer_patterns or (_LAYER_INDEX,)
        match = next((m for m in (p.match(module) for p in patterns) if m), None)
        return match is not None and int(match["idx"]) in self.layers


def _named_by(module: str, names: frozenset[str]) -> bool:
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
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{CONFIG_FILE}: not valid JSON: {error}", name=name, path=path) from error
    if not isinstance(raw, dict):
        invalid(f"expected a JSON object, found {type(raw).__name__}")
    _refuse_unsupported(raw, invalid)

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
    use_dora = _bool("use_dora", raw.get("use_dora"), invalid)
    lora_bias = _bool("lora_bias", raw.get("lora_bias"), invalid)
    if use_dora and lora_bias:
        invalid("use_dora and lora_bias together have no meaning in PEFT")
    return PeftLoraConfig(
        r=_rank("r", raw.get("r"), invalid),
        lora_alpha=_number("lora_alpha", raw.get("lora_alpha"), invalid),
        use_rslora=_bool("use_rslora", raw.get("use_rslora"), invalid),
        rank_patterns=_patterns("rank_pattern", raw.get("rank_pattern"), _rank, invalid),
        alpha_patterns=_patterns("alpha_pattern", raw.get("alpha_pattern"), _number, invalid),
        target_modules=None if target is None else _modules("target_modules", target, invalid),
        exclude_modules=_modules("exclude_modules", raw.get("exclude_modules") or [], invalid),
        layers=_layers(layers, invalid),
        layer_patterns=tuple(
            _regex("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>[0-9]+)\.", invalid)
            for pattern in _strings("layers_pattern", layer_patterns, invalid)
        ),
        use_dora=use_dora,
        lora_bias=lora_bias,
        ensure_weight_tying=_bool("ensure_weight_tying", raw.get("ensure_weight_tying"), invalid),
    )


T = TypeVar("T")
Invalid = Callable[[str], NoReturn]


def _refuse_unsupported(raw: Mapping[str, Any], invalid: Invalid) -> None:
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        invalid(f"peft_type={peft_type!r}: only 'LORA' is supported")
    for field, reason in _UNSUPPORTED.items():
        if raw.get(field):
            invalid(f"{field}={_short(raw[field])}: {reason}")
    bias = raw.get("bias")
    if bias not in (None, "none"):
        invalid(f"bias={_short(bias)}: only 'none' is supported; trained biases cannot be swapped")
    init = raw.get("init_lora_weights", True)
    if init is not None and not isinstance(init, bool) and init not in _PLAIN_INITS:
        invalid(
            f"init_lora_weights={_short(init)}: expected a bool or one of {list(_PLAIN_INITS)}; "
            "other initialisations change the base model's weights, so that A and B alone do not "
            "carry the adapter: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    for field, value in raw.items():
        known = field in _NEUTRAL or field in _USED or field in _UNSUPPORTED
        if value and not known and field != "init_lora_weights":
            invalid(
                f"unknown field {field[:80]!r} = {_short(value)} may change what the adapter "
                "computes; remove it if it is only a note"
            )


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "(deeply nested)"
    return text if len(text) <= 80 else text[:77] + "..."


def _rank(field: str, value: object, invalid: Invalid) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        invalid(f"{field}={_short(value)}: expected a positive integer (the rank)")
    return value


def _number(field: str, value: object, invalid: Invalid) -> float:
    # Bounded rather than math.isfinite, which overflows on JSON's unbounded integers.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e30 < value < 1e30:
        invalid(f"{field}={_short(value)}: expected a finite number")
    return float(value)


def _bool(field: str, value: object, invalid: Invalid) -> bool:
    if value is not None and not isinstance(value, bool):
        invalid(f"{field}={_short(value)}: expected true or false")
    return bool(value)


def _strings(field: str, value: object, invalid: Invalid) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        invalid(f"{field}={_short(value)}: expected a list of strings")
    return value


def _regex(field: str, pattern: str, invalid: Invalid) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        invalid(f"{field}: {_short(pattern)} is not a valid regular expression: {error}")


def _modules(field: str, value: object, invalid: Invalid) -> re.Pattern[str] | frozenset[str]:
    if isinstance(value, str):
        return _regex(field, value, invalid)
    return frozenset(_strings(field, value, invalid))


def _layers(value: object, invalid: Invalid) -> frozenset[int]:
    items = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        invalid(f"layers_to_transform={_short(value)}: expected an integer or a list of integers")
    return frozenset(items)


def _patterns(
    field: str, value: object, check: Callable[[str, object, Invalid], T], invalid: Invalid
) -> tuple[tuple[re.Pattern[str], T], ...]:
    """PEFT's per-module overrides; the first key, in file order, that matches a module wins."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        invalid(f"{field}={_short(value)}: expected an object of module pattern -> value")
    return tuple(
        (_regex(field, rf"(.*\.)?({key})$", invalid), check(f"{field}[{key!r}]", item, invalid))
        for key, item in value.items()
    )
