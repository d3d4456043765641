"""Reads a Hugging Face model folder's ``config.json`` into a :class:`ModelSpec`. No torch here.

Where a key is absent, the default is that of the family's configuration class in transformers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, cast

from aioengine.errors import ConfigError
from aioengine.model.files.packing import Packing
from aioengine.model.files.quantized import QuantizedFolder
from aioengine.model.spec import DTYPE_BYTES, SUPPORTED_ARCHITECTURES, ModelSpec, RopeSpec


class NotNative(ConfigError):
    """The native decoder does not run such a model; transformers may."""


Family = Literal["llama", "mistral", "qwen2", "qwen3"]

ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}


def read_spec(model_dir: Path) -> ModelSpec:
    """The spec of the model in ``model_dir`` (``config.json``, and ``generation_config.json`` if any).

    Raises :class:`ConfigError`, naming the file and the key, if ``config.json`` is missing or
    malformed, or describes a model that the native decoder does not run.
    """
    config = _Config(model_dir / "config.json")
    family = _family(config)
    config.defaults = _DEFAULTS[family]

    hidden_size = config.positive("hidden_size")
    num_layers = config.positive("num_hidden_layers")
    num_heads = config.positive("num_attention_heads")
    num_kv_heads = config.positive("num_key_value_heads", default=num_heads)
    head_dim = config.positive("head_dim", default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise config.error(
            "num_key_value_heads", num_kv_heads, f"must divide num_attention_heads={num_heads}"
        )
    if head_dim % 2:
        raise config.error("head_dim", head_dim, "must be even, because RoPE rotates pairs")
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise config.error("hidden_act", act, "only silu is supported", NotNative)
    attention_bias = family in ("llama", "qwen3") and config.flag("attention_bias")
    bos, eos = _special_tokens(config, model_dir / "generation_config.json")
    return ModelSpec(
        family=family,
        vocab_size=config.positive("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.positive("intermediate_size"),
        rms_norm_eps=config.number("rms_norm_eps", default=1e-6),
        max_position=config.positive("max_position_embeddings"),
        rope=_rope(config),
        tie_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family == "llama" and config.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        sliding_windows=_sliding_windows(config, family, num_layers),
        dtype=_dtype(config),
        bos_token_id=bos,
        eos_token_ids=eos,
        packed=_packed(model_dir, config),
    )


def _packed(model_dir: Path, config: _Config) -> dict[str, Packing]:
    """The quantized linears, by name."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    return {name: layout.packing for name, layout in QuantizedFolder(model_dir, quantization).layouts.items()}


class _Config:
    """A JSON object with typed access; every complaint names the file, the key and the value."""

    def __init__(self, path: Path, *, scope: str = "", raw: dict[str, Any] | None = None) -> None:
        self.path = path
        self.scope = scope
        self.raw = _read_json(path) if raw is None else raw
        self.defaults: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value; if the key is absent, the family's default, then ``default``."""
        return self.raw.get(key, self.defaults.get(key, default))

    def error(
        self, key: str, value: object, problem: str, kind: type[ConfigError] = ConfigError
    ) -> ConfigError:
        return kind(f"{self.path}: {self.scope}{key}={value!r}: {problem}")

    def number(self, key: str, *, default: float | None = None) -> float:
        """A finite number > 0; ``default`` stands in for an absent key and for null."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.path}: {self.scope}{key} is missing; expected a number > 0")
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not ok or not math.isfinite(value) or value <= 0:
            raise self.error(key, value, "must be a number > 0")
        return float(value)

    def positive(self, key: str, *, default: int | None = None) -> int:
        """An integer > 0."""
        value = self.number(key, default=default)
        if value != int(value):
            raise self.error(key, value, "must be an integer")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return bool(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a Hugging Face model folder must contain it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _family(config: _Config) -> Family:
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else None
    family = SUPPORTED_ARCHITECTURES.get(found) if isinstance(found, str) else None
    if found is None and config.get("model_type") in SUPPORTED_ARCHITECTURES.values():
        family = config.get("model_type")
    if family is None:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        shown = found if found is not None else config.get("model_type")
        raise NotNative(f"{config.path}: architecture {shown!r} is not supported; supported: {supported}")
    return cast(Family, family)


def _rope(config: _Config) -> RopeSpec:
    """From ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (before)."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    raw = config.get(key) or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise config.error(key, raw, "must be one flat JSON object for all layers", NotNative)
    rope = _Config(config.path, scope=f"{key}.", raw=raw)
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=10000.0))
    if (share := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))) != 1:
        raise config.error("partial_rotary_factor", share, "only full rotation (1.0) is supported", NotNative)

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


def _sliding_windows(config: _Config, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Per layer the window or None; empty if no layer has one.

    llama never has one. qwen2 and qwen3 have it only with ``use_sliding_window``, in the layers from
    ``max_window_layers`` on. An explicit ``layer_types`` list takes precedence.
    """
    if family == "llama" or config.get("sliding_window") is None:
        window = None
    else:
        window = config.positive("sliding_window")
    if family in ("qwen2", "qwen3") and not config.flag("use_sliding_window"):
        window = None

    layer_types = config.get("layer_types") if family != "llama" else None
    if layer_types is None:
        first = config.get("max_window_layers", 0) if family != "mistral" else 0
        if not isinstance(first, int):
            raise config.error("max_window_layers", first, "must be an integer")
        windows = [window if layer >= first else None for layer in range(num_layers)]
    else:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise config.error("layer_types", layer_types, f"must list {num_layers} layers")
        windows = []
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise config.error(
                    "layer_types", kind, "supported: full_attention, sliding_attention", NotNative
                )
            if kind == "sliding_attention" and window is None:
                raise config.error("layer_types", kind, "needs sliding_window (and it in use)")
            windows.append(window if kind == "sliding_attention" else None)
    return tuple(windows) if any(w is not None for w in windows) else ()


def _dtype(config: _Config) -> Literal["bfloat16", "float16", "float32"]:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise config.error("dtype", value, f"not supported; supported: {', '.join(DTYPE_BYTES)}")
    return cast(Literal["bfloat16", "float16", "float32"], name)


def _special_tokens(config: _Config, generation: Path) -> tuple[int | None, tuple[int, ...]]:
    """The bos id, and every eos id that either file names (instruct models list more in the second)."""
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    own = config.raw.get("eos_token_id")
    return special_tokens(config.path, generation, bos=bos, eos=eos, own=own)


def special_tokens(
    path: Path, generation: Path, *, bos: Any, eos: Any, own: Any
) -> tuple[int | None, tuple[int, ...]]:
    """The bos id and all eos ids, of a configuration's values (``own``: what it says itself, where ``eos``
    may be a default) and the file ``generation``. Raises ConfigError, naming ``path``, for odd values."""
    extra = _Config(generation).get("eos_token_id") if generation.exists() else None
    ids: list[int] = []
    for value in (own if extra is not None else eos, extra):
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or isinstance(token, bool):
                raise ConfigError(f"{path}: eos_token_id={value!r}: must be an integer or a list of them")
            if token not in ids:
                ids.append(token)
    return (bos if isinstance(bos, int) else None), tuple(ids)
