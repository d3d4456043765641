"""The shape of a model, without its weights: what planning, adapter validation and the decoder share.

No torch in this module: ``aioengine plan`` and the policy lab use it without loading anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from aioengine.errors import ConfigError
from aioengine.model.files.packing import Packing

Quantization = Literal["none", "int8"]

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear of a layer that an adapter may target, in the order used everywhere."""

INT8_SCALE_BYTES = 2
"""Bytes of the scale of one head's key or value of a token in an int8 cache."""

EMBEDDING_MODULES = ("embed_tokens", "lm_head")
"""Modules outside of the layers that an adapter may target, if ``LoRAConfig.target_modules`` names them."""

TARGETABLE_MODULES = LORA_MODULES + EMBEDDING_MODULES

NO_LAYER = -1
"""The layer under which tables by (layer, module) hold :data:`EMBEDDING_MODULES`."""

FUSED_MODULES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The linears of a layer and the modules that each fuses, in the order of its output columns."""

_OUTER = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}

ModelImpl = Literal["auto", "native", "transformers"]

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Hugging Face ``architectures`` entry -> family."""


class LinearShape(NamedTuple):
    in_features: int
    out_features: int


class KVShape(NamedTuple):
    """Shape of what a layer caches of a token."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def elements(self) -> int:
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding. ``factor`` and the fields after it belong to the scaled variants."""

    type: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only transformer of the Llama family."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position: int
    rope: RopeSpec
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    """Per layer: the attention window in tokens, or None for full attention; empty = None everywhere."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype that the checkpoint is stored in."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    packed: dict[str, Packing] = {}
    """The weights that the checkpoint has quantized, and that stay so, by the names of their modules."""

    @property
    def impl(self) -> str:
        """Implementation that runs it: "native" or "transformers"."""
        return "native"

    @property
    def ran_by(self) -> str:
        """The same, for people."""
        return f"{self.family}, by the native decoder"

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def linear(self, module: str) -> LinearShape:
        """The shape of what LoRA can target, by its name in :data:`TARGETABLE_MODULES`.

        An embedding is a linear over one-hot tokens.
        """
        h, i = self.hidden_size, self.intermediate_size
        return {
            "q_proj": LinearShape(h, self.q_size),
            "k_proj": LinearShape(h, self.kv_size),
            "v_proj": LinearShape(h, self.kv_size),
            "o_proj": LinearShape(self.q_size, h),
            "gate_proj": LinearShape(h, i),
            "up_proj": LinearShape(h, i),
            "down_proj": LinearShape(i, h),
            "embed_tokens": LinearShape(self.vocab_size, h),
            "lm_head": LinearShape(h, self.vocab_size),
        }[module]

    def targets(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """The modules that slots hold if ``LoRAConfig.target_modules`` is ``asked``; None: the usual ones.

        Raises :class:`ConfigError` for a name that this model does not have.
        """
        chosen = set(LORA_MODULES if asked is None else asked)
        if unknown := sorted(chosen - set(TARGETABLE_MODULES)):
            allowed = ", ".join(TARGETABLE_MODULES)
            raise ConfigError(f"target_modules: {unknown} cannot be targeted; allowed: {allowed}")
        return tuple(module for module in TARGETABLE_MODULES if module in chosen)

    def layers_with(self, module: str) -> int:
        """Return the number of layers in which an adapter may target a module; 1 if it is outside of them."""
        return 1 if module in EMBEDDING_MODULES else self.num_layers

    def fused(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        """The linears of a layer with the modules that each fuses; those outside of layers: ``NO_LAYER``."""
        return {name: (name,) for name in EMBEDDING_MODULES} if layer == NO_LAYER else FUSED_MODULES

    def adaptable(self) -> Iterator[tuple[int, str]]:
        """(layer, module) of all that an adapter may target, those outside of layers first."""
        yield from ((NO_LAYER, module) for module in EMBEDDING_MODULES)
        yield from ((layer, module) for layer in range(self.num_layers) for module in LORA_MODULES)

    def module_name(self, layer: int, module: str) -> str:
        """Return PEFT's name of a module: its path in the Hugging Face model."""
        if layer == NO_LAYER:
            return _OUTER[module]
        block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        return f"model.layers.{layer}.{block}.{module}"

    def find_module(self, name: str) -> tuple[int, str] | None:
        """The (layer, module) that :meth:`module_name` gives this name, for any number of layers."""
        if name in _OUTER.values():
            return NO_LAYER, name.rpartition(".")[2]
        prefix, _, rest = name.partition("model.layers.")
        number, _, path = rest.partition(".")
        module = path.rpartition(".")[2]
        if prefix or module not in LORA_MODULES or not number.isdecimal() or len(number) > 6:
            return None
        layer = int(number)
        return (layer, module) if name == self.module_name(layer, module) else None

    def packed_weights(self) -> Iterator[tuple[LinearShape, Packing]]:
        """The weights of :attr:`packed`, with their shapes; an embedding's is that of a head."""
        for name, packing in self.packed.items():
            module = name.rpartition(".")[2]
            shape = self.linear("lm_head" if module == "embed_tokens" else module)
            yield shape, packing

    def kv_shapes(self) -> tuple[KVShape, ...]:
        """Return the shape of what each layer caches of a token."""
        return (
            KVShape(self.num_kv_heads, self.head_dim, self.num_kv_heads, self.head_dim),
        ) * self.num_layers

    def window(self, layer: int) -> int | None:
        return self.sliding_windows[layer] if self.sliding_windows else None

    def num_parameters(self) -> int:
        """Exactly the parameters that the decoder allocates (tied embeddings counted once)."""
        linears = sum(n_in * n_out for n_in, n_out in map(self.linear, LORA_MODULES))
        bias = self.qkv_bias * (self.q_size + 2 * self.kv_size) + self.o_bias * self.hidden_size
        bias += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * (linears + bias + norms) + self.hidden_size

    @property
    def pair_tokens(self) -> float:
        """A pair of a query and a key in all layers, in tokens through the linears, by multiplications."""
        linears = sum(n_in * n_out for n_in, n_out in map(self.linear, LORA_MODULES))
        return 2 * self.q_size / linears

    def kv_bytes_per_token(self, dtype_bytes: int, *, int8: bool = False) -> int:
        """Return the cache's bytes for a token; in ``int8`` one for each element, and a scale for each
        head."""
        if int8:
            return sum(
                shape.elements + INT8_SCALE_BYTES * (shape.key_heads + shape.value_heads)
                for shape in self.kv_shapes()
            )
        return sum(shape.elements for shape in self.kv_shapes()) * dtype_bytes
