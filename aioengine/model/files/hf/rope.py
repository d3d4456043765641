"""Reads the rotary positions that a ``config.json`` describes. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from aioengine.model.files.hf.config_file import ConfigFile, NotNative
from aioengine.model.files.hf.families import Family
from aioengine.model.spec import RopeSpec

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_YARN = ("factor", "beta_fast", "beta_slow", "attention_factor")
"""Numbers in a configuration, under the names that :class:`RopeSpec` has for them."""


def read_ropes(
    config: ConfigFile, family: Family, head_dim: int, windows: Sequence[int | None], num_layers: int
) -> dict[str, Any]:
    """Return the rotations of a model, as fields of :class:`aioengine.model.spec.ModelSpec`. Raises
    ConfigError for odd values, and NotNative for what is not known."""
    if family.local_theta is not None:
        sliding = tuple(layer for layer, window in enumerate(windows) if window is not None)
        full, local = _by_layer_type(config, family.local_theta)
        if not sliding or local == full:
            return {"rope": full}
        return {"rope": full, "other_rope": local, "other_rope_layers": sliding}
    found = _flat(config, family, head_dim)
    if "no_rope_layer_interval" in family.absent and (without := _layers_without(config, num_layers)):
        found |= {"other_rope": RopeSpec(type="none"), "other_rope_layers": without}
    return found


def _flat(config: ConfigFile, family: Family, head_dim: int) -> dict[str, Any]:
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
        if not family.partial:
            problem = "only full rotation (1.0) is supported"
            raise config.error("partial_rotary_factor", share, problem, NotNative)
        if not isinstance(share, float) or not 0 < share < 1 or int(head_dim * share) % 2:
            raise config.error("partial_rotary_factor", share, "must give an even part of the head dimension")
        rotary_dim = int(head_dim * share)
    return {"rope": _one(config, rope, rotary_dim or head_dim), "rotary_dim": rotary_dim}


def _by_layer_type(config: ConfigFile, theta: float) -> tuple[RopeSpec, ...]:
    """Return the rotations of layers with full attention, and of those with a window."""
    raw = config.get("rope_parameters") or {}
    if raw and not (isinstance(raw, dict) and all(isinstance(value, dict) for value in raw.values())):
        problem = "must have an object for full_attention and one for sliding_attention"
        raise config.error("rope_parameters", raw, problem, NotNative)
    full = raw.get("full_attention") or config.get("rope_scaling") or {}
    if not isinstance(full, dict):
        raise config.error("rope_scaling", full, "must be a JSON object")
    scope = "rope_parameters.full_attention." if raw else "rope_scaling."
    local = dict(raw.get("sliding_attention") or {})
    # Its key before transformers 5.
    local.setdefault("rope_theta", config.number("rope_local_base_freq", default=theta))
    local_scope = "rope_parameters.sliding_attention."
    return tuple(
        _one(config, ConfigFile(config.path, scope=scope, raw=raw))
        for scope, raw in ((scope, full), (local_scope, local))
    )


def _layers_without(config: ConfigFile, num_layers: int) -> tuple[int, ...]:
    """Return the layers that rotate nothing: every n-th, or those for which ``no_rope_layers`` has a 0."""
    listed = config.get("no_rope_layers")
    if listed is None:
        interval = config.positive("no_rope_layer_interval")
        return tuple(layer for layer in range(num_layers) if (layer + 1) % interval == 0)
    if not isinstance(listed, list) or len(listed) < num_layers or not {0, 1}.issuperset(listed):
        raise config.error(
            "no_rope_layers", listed, f"must be a list of 0 or 1 for each of {num_layers} layers"
        )
    return tuple(layer for layer in range(num_layers) if not listed[layer])


def _one(config: ConfigFile, rope: ConfigFile, dim: int = 0) -> RopeSpec:
    """Read a rotation of ``dim`` dimensions."""
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=10000.0))
    kind: Any = rope.get("rope_type") or rope.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name of it
    if kind not in ROPE_TYPES or (rope.get("mscale") and rope.get("mscale_all_dim")):
        problem = f"not supported; supported: {', '.join(ROPE_TYPES)}, without mscale"
        raise rope.error("rope_type", kind, problem, NotNative)
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(type="linear", theta=theta, factor=rope.number("factor"))
    max_position = config.positive("max_position_embeddings")
    key = "original_max_position_embeddings"
    original = config.positive(key, default=rope.positive(key, default=max_position))
    if kind == "longrope":
        return _longrope(rope, dim, theta, original, max_position)
    if kind == "llama3":
        fields: dict[str, Any] = {key: rope.number(key) for key in _LLAMA3}
        if (low := fields["low_freq_factor"]) >= fields["high_freq_factor"]:
            raise rope.error(
                "low_freq_factor", low, f"must be < high_freq_factor={fields['high_freq_factor']}"
            )
    else:
        fields = {key: rope.number(key) for key in _YARN if rope.get(key) is not None}
        fields.setdefault("factor", max_position / original)
        fields["truncate"] = rope.get("truncate") is not False
    return RopeSpec(type=kind, theta=theta, original_max_position=original, **fields)


def _longrope(rope: ConfigFile, dim: int, theta: float, original: int, max_position: int) -> RopeSpec:
    """Read LongRoPE (Ding et al., 2024, arXiv:2402.13753) for sequences up to the original length.

    The factors of longer ones would change the keys of what is cached, when a sequence becomes longer.
    """
    divisors = rope.get("short_factor")
    numbers = isinstance(divisors, list) and all(isinstance(x, (int, float)) and x > 0 for x in divisors)
    if not numbers or len(divisors) != dim // 2:
        raise rope.error("short_factor", divisors, f"must be a list of {dim // 2} numbers > 0")
    factor = rope.number("factor", default=max_position / original)
    scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeSpec(
        type="longrope",
        theta=theta,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", default=scaling),
        divisors=tuple(map(float, divisors)),
    )
