"""Reads a Hugging Face model's ``config.json`` into a :class:`ModelSpec`. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from aioengine.errors import ConfigError
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.hf.config_file import ConfigFile, NotNative
from aioengine.model.files.hf.families import FAMILIES
from aioengine.model.files.hf.rope import read_ropes
from aioengine.model.files.quantized import read_folder, with_packed
from aioengine.model.spec import (
    DTYPE_BYTES,
    MAX_EXPERTS,
    MAX_LAYERS,
    SUPPORTED_ARCHITECTURES,
    ModelSpec,
    RopeSpec,
)

_COUNTS = ("num_experts", "num_local_experts")
"""Keys for the number of experts; transformers takes either for the other."""


def read_spec(model_dir: Path) -> ModelSpec:
    """Return the spec of the model in ``model_dir`` (``config.json``, and ``generation_config.json`` if any).

    Raises :class:`ConfigError`, naming the file and the key, if ``config.json`` is missing or
    malformed, or describes a model that the native decoder does not run.
    """
    config = ConfigFile(model_dir / "config.json")
    spec = parse_config(config)
    quantization = config.get("quantization_config")
    if quantization is None:
        return spec
    mxfp4 = isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"
    if spec.family == "gpt_oss" and not mxfp4:
        problem = "gpt_oss is supported in: MXFP4, or none"
        raise config.error("quantization_config", quantization, problem, NotNative)
    return with_packed(spec, read_folder(model_dir, spec, quantization))


def parse_config(config: ConfigFile) -> ModelSpec:
    """Return the spec of a configuration, without the forms in which weights are stored. Raises ConfigError
    as :func:`read_spec` does."""
    name = _family(config)
    family = FAMILIES[name]
    config.defaults = family.absent
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
    _check_kind(config, gelu=family.fields.get("activation") == "gelu_tanh")
    windows = _sliding_windows(config, family.windows, num_layers)
    ropes = read_ropes(config, family, head_dim, windows, num_layers)
    max_position = config.positive("max_position_embeddings")
    rope: RopeSpec = ropes["rope"]
    if rope.type == "longrope":  # its factors for longer sequences are not used
        max_position = min(max_position, rope.original_max_position)
    numbers = {field: key for field, key in family.numbers.items() if config.get(key) is not None}
    fields = family.fields | {field: config.number(key) for field, key in numbers.items()}
    if name.startswith("gemma"):
        fields["embedding_scale"] = hidden_size**0.5
    if name in ("gemma2", "gemma3_text"):
        fields["attention_scale"] = config.number("query_pre_attn_scalar") ** -0.5
    if config.flag("qkv_bias"):
        fields["qkv_bias"] = True
    if config.flag("attention_bias"):
        fields |= dict.fromkeys(family.biases, True)
    bos, eos = special_tokens(
        config.path,
        config.path.with_name("generation_config.json"),
        bos=config.get("bos_token_id"),
        eos=config.get("eos_token_id"),
        own=config.raw.get("eos_token_id"),
    )
    experts = None if family.experts is None else {**family.experts, **_experts(config, family.experts)}
    return (ModelSpec if experts is None else MixtureSpec)(
        family=name,
        vocab_size=config.positive("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.positive("intermediate_size"),
        rms_norm_eps=config.number("rms_norm_eps"),
        max_position=max_position,
        tie_embeddings=config.flag("tie_word_embeddings"),
        mlp_bias=config.flag("mlp_bias"),
        sliding_windows=windows,
        dtype=_dtype(config),
        bos_token_id=bos,
        eos_token_ids=eos,
        **ropes,
        **fields,
        **(experts or {}),
    )


def _family(config: ConfigFile) -> str:
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else None
    family = SUPPORTED_ARCHITECTURES.get(found) if isinstance(found, str) else None
    if found is None and config.get("model_type") in FAMILIES:
        family = config.get("model_type")
    if family is None:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        shown = found if found is not None else config.get("model_type")
        raise NotNative(f"{config.path}: architecture {shown!r} is not supported; supported: {supported}")
    return family


def _check_kind(config: ConfigFile, *, gelu: bool) -> None:
    """Raise NotNative for an activation or a mask that the family does not have natively."""
    # In Gemma's first configurations "gelu" meant the same as the other one.
    known = ("gelu_pytorch_tanh", "gelu") if gelu else ("silu", "swish")
    key = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    act = config.get(key, known[0])
    if act not in known[: 1 if key == "hidden_activation" else 2]:
        raise config.error(key, act, f"only {known[0]} is supported", NotNative)
    if config.get("use_bidirectional_attention"):
        raise config.error(
            "use_bidirectional_attention", True, "only causal attention is supported", NotNative
        )


def _experts(config: ConfigFile, family: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`MixtureSpec` that a configuration says. Raises NotNative for layers
    without experts, and for what is not known."""
    for key, plain in (("clip_qkv", None), ("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if (value := config.get(key)) not in (None, plain):
            raise config.error(key, value, f"only {plain!r} is supported", NotNative)
    key = next((key for key in _COUNTS if key in config.raw), _COUNTS[0])
    experts, chosen = config.positive(key, most=MAX_EXPERTS), config.positive("num_experts_per_tok")
    if chosen > experts:
        raise config.error("num_experts_per_tok", chosen, f"must be <= {key}={experts}")
    own_size = "moe_intermediate_size" in config.defaults
    fields: dict[str, Any] = {
        "experts": experts,
        "experts_per_token": chosen,
        "expert_size": config.positive("moe_intermediate_size" if own_size else "intermediate_size"),
    }
    if "normalized" not in family:
        fields["normalized"] = config.flag("norm_topk_prob")
    if "shared_expert_intermediate_size" in config.defaults:
        fields["shared_size"] = config.positive("shared_expert_intermediate_size")
    return fields


def _sliding_windows(config: ConfigFile, kind: str, num_layers: int) -> tuple[int | None, ...]:
    """Return the window or None of each layer; empty if no layer has one. ``kind`` is that of the family. A
    ``layer_types`` list takes precedence over every ``sliding_window_pattern``-th layer without one."""
    if kind == "never":
        return ()
    window = None
    asked = kind == "always" or config.flag("use_sliding_window")
    if asked and config.get("sliding_window") is not None:
        window = config.positive("sliding_window")
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise config.error("layer_types", layer_types, f"must list {num_layers} layers")
        slides = [_slides(config, layer_type, window) for layer_type in layer_types]
    elif window is None:
        return ()
    elif kind == "from_layer":
        first = config.positive("max_window_layers")
        slides = [layer >= first for layer in range(num_layers)]
    elif kind == "asked":
        raise config.error("use_sliding_window", True, "only with layer_types", NotNative)
    else:
        every = config.get("sliding_window_pattern") is not None
        pattern = config.positive("sliding_window_pattern") if every else num_layers + 1
        slides = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    return tuple(window if one else None for one in slides) if any(slides) else ()


def _slides(config: ConfigFile, layer_type: object, window: int | None) -> bool:
    if layer_type not in ("full_attention", "sliding_attention"):
        problem = "supported: full_attention, sliding_attention"
        raise config.error("layer_types", layer_type, problem, NotNative)
    if layer_type == "sliding_attention" and window is None:
        raise config.error("layer_types", layer_type, "needs sliding_window (and use_sliding_window)")
    return layer_type == "sliding_attention"


def _dtype(config: ConfigFile) -> Literal["bfloat16", "float16", "float32"]:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise config.error("dtype", value, f"not supported; supported: {', '.join(DTYPE_BYTES)}")
    return cast(Literal["bfloat16", "float16", "float32"], name)


def special_tokens(
    path: Path, generation: Path, *, bos: Any, eos: Any, own: Any
) -> tuple[int | None, tuple[int, ...]]:
    """Return the bos id and all eos ids (instruct models list more in the second file), of a configuration's
    values (``own``: what it says itself, where ``eos`` may be a default) and the file ``generation``. Raises
    ConfigError, naming ``path``, for odd values."""
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
