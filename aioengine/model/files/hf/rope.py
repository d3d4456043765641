"""Reads the rotary positions that a ``config.json`` describes. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from aioengine.model.files.hf.config_file import ConfigFile, NotNative
from aioengine.model.files.hf.families import Family
from aioengine.model.spec import RopeSpec

ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_LONGROPE_NAMES = ("longrope", "su", "yarn")
"""Names of LongRoPE, among them Phi-3's earlier ones."""

_PARTIAL: tuple[Family, ...] = ("phi3", "glm4")
"""Families that heed ``partial_rotary_factor``."""

_BY_LAYER_TYPE: dict[Family, str | None] = {"gemma3_text": "rope_local_base_freq", "olmo3": None}
"""Families whose sliding layers have a rotation of their own, and the key that its base had before
transformers 5."""

_LOCAL_THETA: dict[Family, float] = {"gemma3_text": 1e4, "olmo3": 5e5}


class RopeConfig(NamedTuple):
    """Rotations as :class:`aioengine.model.spec.ModelSpec` has them."""

    rope: RopeSpec
    other: RopeSpec | None = None
    other_layers: tuple[int, ...] = ()
    rotary_dim: int | None = None
    longest: int | None = None
    """The longest sequence that the rotations are for, if it is shorter than the model's."""


def read_ropes(
    config: ConfigFile, family: Family, head_dim: int, windows: Sequence[int | None], num_layers: int
) -> RopeConfig:
    """Return the rotations of a model. Raises ConfigError for odd values, and NotNative for what is not
    known."""
    if family in _BY_LAYER_TYPE:
        sliding = tuple(layer for layer, window in enumerate(windows) if window is not None)
        full, local = _by_layer_type(config, family)
        return RopeConfig(full, local, sliding) if sliding and local != full else RopeConfig(full)
    found = _flat(config, family, head_dim)
    if family == "smollm3" and (without := _layers_without(config, num_layers)):
        return found._replace(other=RopeSpec(type="none"), other_layers=without)
    return found


def _flat(config: ConfigFile, family: Family, head_dim: int) -> RopeConfig:
    """Read one rotation: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``
    (before)."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    raw = config.get(key) or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise config.error(key, raw, "must be one flat JSON object for all layers", NotNative)
    rope = ConfigFile(config.path, scope=f"{key}.", raw=raw)
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))
    rotary_dim = None
    if share != 1:
        if family not in _PARTIAL:
            problem = "only full rotation (1.0) is supported"
            raise config.error("partial_rotary_factor", share, problem, NotNative)
        if not isinstance(share, float) or not 0 < share < 1 or int(head_dim * share) % 2:
            raise config.error("partial_rotary_factor", share, "must give an even part of the head dimension")
        rotary_dim = int(head_dim * share)
    if family == "phi3" and (rope.get("rope_type") or rope.get("type")) in _LONGROPE_NAMES:
        spec = _longrope(config, rope, rotary_dim or head_dim)
        return RopeConfig(spec, rotary_dim=rotary_dim, longest=spec.original_max_position)
    return RopeConfig(_one(config, rope), rotary_dim=rotary_dim)


def _by_layer_type(config: ConfigFile, family: Family) -> tuple[RopeSpec, RopeSpec]:
    """Return the rotations of layers with full attention, and of those with a window."""
    raw = config.get("rope_parameters") or {}
    if raw and not (isinstance(raw, dict) and all(isinstance(value, dict) for value in raw.values())):
        raise config.error(
            "rope_parameters",
            raw,
            "must have an object for full_attention and one for sliding_attention",
            NotNative,
        )
    full = raw.get("full_attention") or config.get("rope_scaling") or {}
    if not isinstance(full, dict):
        raise config.error("rope_scaling", full, "must be a JSON object")
    scope = "rope_parameters.full_attention." if raw else "rope_scaling."
    local_key, theta = _BY_LAYER_TYPE[family], _LOCAL_THETA[family]
    local = dict(raw.get("sliding_attention") or {})
    if local_key is not None:
        theta = config.number(local_key, default=theta)
    local.setdefault("rope_theta", theta)
    return (
        _one(config, ConfigFile(config.path, scope=scope, raw=full)),
        _one(config, ConfigFile(config.path, scope="rope_parameters.sliding_attention.", raw=local)),
    )


def _layers_without(config: ConfigFile, num_layers: int) -> tuple[int, ...]:
    """Return the layers that rotate nothing: every n-th, or those for which ``no_rope_layers`` has a 0."""
    listed = config.get("no_rope_layers")
    if listed is None:
        interval = config.positive("no_rope_layer_interval")
        return tuple(layer for layer in range(num_layers) if (layer + 1) % interval == 0)
    if (
        not isinstance(listed, list)
        or len(listed) < num_layers
        or any(value not in (0, 1) for value in listed)
    ):
        raise config.error(
            "no_rope_layers", listed, f"must be a list of 0 or 1 for each of {num_layers} layers"
        )
    return tuple(layer for layer in range(num_layers) if not listed[layer])


def _longrope(config: ConfigFile, rope: ConfigFile, dim: int) -> RopeSpec:
    """Read LongRoPE (Ding et al., 2024, arXiv:2402.13753) for sequences up to the original length.

    The factors of longer ones would change the keys of what is cached, when a sequence becomes longer.
    """
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=10000.0))
    key = "original_max_position_embeddings"
    original = rope.positive(key, default=config.positive(key, default=4096))
    divisors = rope.get("short_factor")
    numbers = isinstance(divisors, list) and all(isinstance(x, (int, float)) and x > 0 for x in divisors)
    if not numbers or len(divisors) != dim // 2:
        raise rope.error("short_factor", divisors, f"must be a list of {dim // 2} numbers > 0")
    factor = rope.number("factor", default=config.positive("max_position_embeddings") / original)
    scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeSpec(
        type="longrope",
        theta=theta,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", default=scaling),
        divisors=tuple(map(float, divisors)),
    )


def _one(config: ConfigFile, rope: ConfigFile) -> RopeSpec:
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=10000.0))

    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise rope.error("rope_type", kind, f"not supported; supported: {', '.join(ROPE_TYPES)}", NotNative)
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(type="linear", theta=theta, factor=rope.number("factor"))

    max_position = config.positive("max_position_embeddings")
    key = "original_max_position_embeddings"
    original = config.positive(key, default=rope.positive(key, default=max_position))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.error("low_freq_factor", low, f"must be < high_freq_factor={high}")
        return RopeSpec(
            type="llama3",
            theta=theta,
            factor=rope.number("factor"),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )

    def optional(name: str) -> float | None:
        return rope.number(name) if rope.get(name) else None

    truncate = rope.get("truncate", True)
    return RopeSpec(
        type="yarn",
        theta=theta,
        factor=rope.number("factor", default=max_position / original),
        original_max_position=original,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=True if truncate is None else bool(truncate),
    )
