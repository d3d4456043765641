"""Reads a Hugging Face model folder's ``config.json`` into a :class:`ModelSpec`. No torch here.

Where a key is absent, the default is that of the family's configuration class in transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from aioengine.errors import ConfigError
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files import folder
from aioengine.model.files.hf.config_file import ConfigFile, NotNative
from aioengine.model.files.hf.experts import is_mxfp4, read_experts
from aioengine.model.files.hf.families import BIASES, DEFAULTS, MLP_BIAS, TRAITS, Family
from aioengine.model.files.hf.rope import read_ropes
from aioengine.model.files.packing import Packing
from aioengine.model.files.quantized import QuantizedFolder, with_packed
from aioengine.model.files.stacked_experts import packed_experts
from aioengine.model.spec import DTYPE_BYTES, MAX_LAYERS, SUPPORTED_ARCHITECTURES, ModelSpec

__all__ = ["NotNative", "read_spec", "special_tokens"]

_NO_WINDOWS: tuple[Family, ...] = ("llama", "granite", "olmo2", "gemma", "glm4", "olmoe")
"""Families that always attend to everything."""
_PATTERN: tuple[Family, ...] = ("gemma2", "gemma3_text", "olmo3", "gpt_oss")
"""Families in which every ``sliding_window_pattern``-th layer attends to everything."""


def read_spec(model_dir: Path) -> ModelSpec:
    """Return the spec of the model in ``model_dir`` (``config.json``, and ``generation_config.json`` if any).

    Raises :class:`ConfigError`, naming the file and the key, if ``config.json`` is missing or
    malformed, or describes a model that the native decoder does not run.
    """
    config = ConfigFile(model_dir / "config.json")
    family = _family(config)
    config.defaults = DEFAULTS[family]

    hidden_size = config.positive("hidden_size")
    num_layers = config.positive("num_hidden_layers", most=MAX_LAYERS)
    num_heads = config.positive("num_attention_heads")
    num_kv_heads = config.positive("num_key_value_heads", default=num_heads)
    head_dim = config.positive("head_dim", default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise config.error(
            "num_key_value_heads", num_kv_heads, f"must divide num_attention_heads={num_heads}"
        )
    if head_dim % 2:
        raise config.error("head_dim", head_dim, "must be even, because RoPE rotates pairs")
    _check_kind(config, family)
    windows = _sliding_windows(config, family, num_layers)
    ropes = read_ropes(config, family, head_dim, windows, num_layers)
    max_position = config.positive("max_position_embeddings")
    fields = {**TRAITS[family], **_multipliers(config, family, hidden_size)}
    if family == "qwen2_moe" and config.flag("qkv_bias"):
        fields["qkv_bias"] = True
    if config.flag("attention_bias"):
        fields |= dict.fromkeys(BIASES.get(family, ()), True)
    bos, eos = _special_tokens(config, model_dir / "generation_config.json")
    experts = read_experts(config, family, num_layers)
    spec = (MixtureSpec if experts else ModelSpec)(
        family=family,
        vocab_size=config.positive("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.positive("intermediate_size"),
        rms_norm_eps=config.number("rms_norm_eps", default=1e-6),
        max_position=min(max_position, ropes.longest or max_position),
        rope=ropes.rope,
        other_rope=ropes.other,
        other_rope_layers=ropes.other_layers,
        rotary_dim=ropes.rotary_dim,
        tie_embeddings=config.flag("tie_word_embeddings"),
        mlp_bias=family in MLP_BIAS and config.flag("mlp_bias"),
        sliding_windows=windows,
        dtype=_dtype(config),
        bos_token_id=bos,
        eos_token_ids=eos,
        **fields,
        **experts,
    )
    return with_packed(spec, _packings(model_dir, config, spec))


def _packings(model_dir: Path, config: ConfigFile, spec: ModelSpec) -> dict[str, Packing]:
    """Return the quantized linears, by name."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    if is_mxfp4(quantization) and isinstance(spec, MixtureSpec):
        return packed_experts(folder.headers(model_dir), spec)
    return {name: layout.packing for name, layout in QuantizedFolder(model_dir, quantization).layouts.items()}


def _check_kind(config: ConfigFile, family: Family) -> None:
    """Raise NotNative for an activation or a mask that the family does not have natively."""
    gelu = TRAITS[family].get("activation") == "gelu_tanh"
    key = "hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act"
    known: tuple[str, ...] = ("gelu_pytorch_tanh",) if gelu else ("silu", "swish")
    if family == "gemma":
        known += ("gelu",)  # which meant the same in its first configurations
    if (act := config.get(key, "silu")) not in known:
        raise config.error(key, act, f"only {known[0]} is supported", NotNative)
    if config.get("use_bidirectional_attention"):
        raise config.error(
            "use_bidirectional_attention", True, "only causal attention is supported", NotNative
        )


def _multipliers(config: ConfigFile, family: Family, hidden_size: int) -> dict[str, Any]:
    """Return factors and soft caps, as fields of ModelSpec."""
    if family == "granite":  # after muP: Yang et al., 2022, arXiv:2203.03466
        return {
            "embedding_scale": config.number("embedding_multiplier", default=1.0),
            "residual_scale": config.number("residual_multiplier", default=1.0),
            "attention_scale": config.number("attention_multiplier", default=1.0),
            "logit_divisor": config.number("logits_scaling", default=1.0),
        }
    if not family.startswith("gemma"):
        return {}
    fields: dict[str, Any] = {"embedding_scale": hidden_size**0.5}
    if family != "gemma":
        fields["attention_scale"] = config.number("query_pre_attn_scalar") ** -0.5
        fields["logit_cap"] = _cap(config, "final_logit_softcapping")
    if family == "gemma2":
        fields["attention_cap"] = _cap(config, "attn_logit_softcapping")
    return fields


def _cap(config: ConfigFile, key: str) -> float | None:
    return None if config.get(key) is None else config.number(key)


def _family(config: ConfigFile) -> Family:
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


def _sliding_windows(config: ConfigFile, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Return the window or None of each layer; empty if no layer has one.

    The families of Qwen have it only with ``use_sliding_window``, and qwen2 and qwen3 in the layers from
    ``max_window_layers`` on; others in all layers but every ``sliding_window_pattern``-th. An explicit
    ``layer_types`` list takes precedence.
    """
    unused = family.startswith(("qwen", "smollm3")) and not config.flag("use_sliding_window")
    if family in _NO_WINDOWS or unused or config.get("sliding_window") is None:
        window = None
    else:
        window = config.positive("sliding_window")
    if family == "qwen2_moe" and window is not None and config.get("layer_types") is None:
        raise config.error("use_sliding_window", True, "only with layer_types", NotNative)

    layer_types = config.get("layer_types") if family not in _NO_WINDOWS else None
    pattern = config.get("sliding_window_pattern")
    if layer_types is None and pattern is not None and family in _PATTERN:
        pattern = config.positive("sliding_window_pattern")
        windows = [window if (layer + 1) % pattern else None for layer in range(num_layers)]
    elif layer_types is None:
        first = config.get("max_window_layers", 0) if family in ("qwen2", "qwen3") else 0
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
                raise config.error("layer_types", kind, "needs sliding_window (and use_sliding_window)")
            windows.append(window if kind == "sliding_attention" else None)
    return tuple(windows) if any(w is not None for w in windows) else ()


def _dtype(config: ConfigFile) -> Literal["bfloat16", "float16", "float32"]:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise config.error("dtype", value, f"not supported; supported: {', '.join(DTYPE_BYTES)}")
    return cast(Literal["bfloat16", "float16", "float32"], name)


def _special_tokens(config: ConfigFile, generation: Path) -> tuple[int | None, tuple[int, ...]]:
    """Return the bos id, and every eos id that either file names (instruct models list more in the
    second)."""
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    own = config.raw.get("eos_token_id")
    return special_tokens(config.path, generation, bos=bos, eos=eos, own=own)


def special_tokens(
    path: Path, generation: Path, *, bos: Any, eos: Any, own: Any
) -> tuple[int | None, tuple[int, ...]]:
    """Return the bos id and all eos ids, of a configuration's values (``own``: what it says itself, where
    ``eos`` may be a default) and the file ``generation``. Raises ConfigError, naming ``path``, for odd
    values."""
    extra = ConfigFile(generation).get("eos_token_id") if generation.exists() else None
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
