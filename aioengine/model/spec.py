"""The shape of a model, without its weights: what planning, adapter validation and the decoder share.

No torch in this module: ``aioengine plan`` and the policy lab use it without loading anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import msgspec

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.model.files.packing import Packing

Quantization = Literal["none", "int8", "int4", "fp8"]

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear of a layer that an adapter may target, in the order used everywhere. Some families have
:data:`QKV` or :data:`GATE_UP` in the place of several."""

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
"""One matrix for queries, keys and values, and one for gate and up, in checkpoints and to adapters."""

INT8_SCALE_BYTES = 2
"""Bytes of the scale of one head's key or value of a token in an int8 cache."""

EMBEDDING_MODULES = ("embed_tokens", "lm_head")
"""Modules outside of the layers that an adapter may target, if ``LoRAConfig.target_modules`` names them."""

TARGETABLE_MODULES = LORA_MODULES + EMBEDDING_MODULES

NO_LAYER = -1
"""The layer under which tables by (layer, module) hold :data:`EMBEDDING_MODULES`."""

_OUTER = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
_OUTER_LINEARS = {name: (name,) for name in EMBEDDING_MODULES}

ModelImpl = Literal["auto", "native", "transformers"]

MAX_LAYERS, MAX_EXPERTS = 1024, 4096
"""What a configuration may ask for; more would take long to plan, and no such model is known."""

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "Phi3ForCausalLM": "phi3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Glm4ForCausalLM": "glm4",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "GptOssForCausalLM": "gpt_oss",
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


class BareParameter(NamedTuple):
    """A parameter that PEFT's ``target_parameters`` may name, with the linears that are in it."""

    owner: str
    """Path of the module that has it, in transformers."""
    name: str
    experts: Sequence[Sequence[str]]
    """For each expert PEFT's names of its linears, one below the other, or with alternating rows. Of what is
    no expert's there is one entry."""
    alternating: bool = False


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding. ``factor`` and the fields after it belong to the scaled variants.

    ``none`` rotates nothing. ``longrope`` is meant for sequences up to the original length, and takes
    ``attention_factor`` and ``divisors``.
    """

    type: Literal["default", "linear", "llama3", "yarn", "longrope", "none"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    """Divisors of the frequencies, one for each pair."""


class NormNames(msgspec.Struct, frozen=True, kw_only=True):
    """A layer's norms by their names in a checkpoint, in the order of use; None: there is no such norm."""

    attention_input: str | None = "input_layernorm"
    attention_output: str | None = None
    """Before the outputs are added to the hidden state."""
    mlp_input: str | None = "post_attention_layernorm"
    mlp_output: str | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One decoder-only transformer: Llama's (arXiv:2302.13971) unless the fields with defaults say
    otherwise."""

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
    qk_norm_whole: bool = False
    """Whether queries, and keys, are normed over all heads together, not each head by itself."""
    norms: NormNames = NormNames()
    norm_offset: float | None = None
    """Number that norms add to their weights; they then round only once. None: the normed values are rounded
    before they are multiplied with the weights."""
    fused_qkv: bool = False
    """Whether there is a ``qkv_proj`` instead of ``q_proj``, ``k_proj`` and ``v_proj``."""
    fused_gate_up: bool = False
    """Whether there is a ``gate_up_proj`` instead of ``gate_proj`` and ``up_proj``."""
    activation: Literal["silu", "gelu_tanh", "clamped_swiglu"] = "silu"
    swiglu_alpha: float = 1.0
    swiglu_limit: float = 1.0
    """Numbers of :meth:`aioengine.kernels.Backend.clamped_swiglu`."""
    embedding_scale: float = 1.0
    """Factor of the embeddings, rounded to the compute dtype."""
    residual_scale: float = 1.0
    """Factor of what a layer adds to the hidden state."""
    attention_scale: float | None = None
    """Factor of the scores; None: ``head_dim ** -0.5``."""
    attention_cap: float | None = None
    """Soft cap of the scores: ``cap * tanh(score / cap)``."""
    sinks: bool = False
    """Whether each head has a sink, as in :meth:`aioengine.kernels.Backend.paged_attention`."""
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    """Soft cap of the logits, as ``attention_cap``."""
    rotary_dim: int | None = None
    """How many dimensions of a head are rotated, the first ones; None: all."""
    rotary_neighbours: bool = False
    """Whether dimension 2 i is rotated with 2 i + 1, and not i with i + rotary_dim / 2."""
    other_rope: RopeSpec | None = None
    """The rotation of ``other_rope_layers``, in the place of ``rope``."""
    other_rope_layers: tuple[int, ...] = ()
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
        """Name of that implementation for people."""
        return f"{self.family}, by the native decoder"

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_sizes(self) -> dict[str, int]:
        """Sizes between the two matrices of the MLPs, by their names for people."""
        return {"intermediate size": self.intermediate_size}

    def linear(self, module: str) -> LinearShape:
        """Return the shape of what LoRA can target, by its name in :data:`TARGETABLE_MODULES`.

        An embedding is a linear over one-hot tokens.
        """
        h, i = self.hidden_size, self.intermediate_size
        return {
            "q_proj": LinearShape(h, self.q_size),
            "k_proj": LinearShape(h, self.kv_size),
            "v_proj": LinearShape(h, self.kv_size),
            QKV: LinearShape(h, self.q_size + 2 * self.kv_size),
            "o_proj": LinearShape(self.q_size, h),
            "gate_proj": LinearShape(h, i),
            "up_proj": LinearShape(h, i),
            GATE_UP: LinearShape(h, 2 * i),
            "down_proj": LinearShape(i, h),
            "embed_tokens": LinearShape(self.vocab_size, h),
            "lm_head": LinearShape(h, self.vocab_size),
        }[module]

    def targets(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """Return the modules that slots hold if ``LoRAConfig.target_modules`` is ``asked``; None: all of the
        layers'. A name means all modules that :meth:`known_as` gives it, and what one expert has, all have.

        Raises :class:`ConfigError` for a name that this model does not have.
        """
        if asked is None:
            return self.layer_modules
        kinds = {module: self.kind_of(module) for module in (*self.layer_modules, *self.outer_modules)}
        names = {name for kind in kinds.values() for name in self.known_as(kind)}
        if unknown := [name for name in asked if self.kind_of(name) not in names]:
            raise ConfigError(
                f"target_modules: {unknown} cannot be targeted; allowed: "
                f"{', '.join(dict.fromkeys(kinds.values()))}{nearest(unknown[0], sorted(names))}"
            )
        wanted = set(map(self.kind_of, asked))
        return tuple(module for module, kind in kinds.items() if wanted.intersection(self.known_as(kind)))

    def known_as(self, kind: str) -> tuple[str, ...]:
        """Return the names that mean modules of this kind: its path, and the last and first part of it."""
        return (kind, kind.rpartition(".")[2], kind.partition(".")[0])

    @property
    def outer_modules(self) -> tuple[str, ...]:
        """The modules outside of the layers that an adapter may target."""
        return EMBEDDING_MODULES

    def layers_with(self, module: str) -> int:
        """Return the number of layers in which an adapter may target a module; 1 if it is outside of them."""
        return self._layers_with[module]

    @cached_property
    def _layers_with(self) -> Counter[str]:
        return Counter(module for _, module in self._names)

    def kind_of(self, module: str) -> str:
        """Return the name under which a module and others like it are counted together."""
        return module

    def is_bare(self, module: str) -> bool:
        """Return whether a module is a part of a parameter, which PEFT's ``target_modules`` cannot name."""
        return False

    def bare_parameters(self) -> Iterator[BareParameter]:
        """Yield what PEFT's ``target_parameters`` may name; those of one module follow each other, in its
        order. None of a model without experts that the native decoder runs."""
        return iter(())

    def experts_in(self, linear: str) -> int:
        """Return the number of experts whose linears are one below the other in one of :meth:`fused`; 0: they
        are not experts'."""
        return 0

    def fused(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        """Return the linears of a layer with the modules that each fuses; those outside of layers:
        ``NO_LAYER``."""
        return _OUTER_LINEARS if layer == NO_LAYER else self._layer_linears

    def has_bias(self, linear: str) -> bool:
        """Return whether one of :meth:`fused` has a bias."""
        return {"qkv": self.qkv_bias, "o": self.o_bias}.get(linear, self.mlp_bias)

    @cached_property
    def _layer_linears(self) -> Mapping[str, tuple[str, ...]]:
        qkv = (QKV,) if self.fused_qkv else ("q_proj", "k_proj", "v_proj")
        return {"qkv": qkv, "o": ("o_proj",), **self.mlp_linears}

    @property
    def mlp_linears(self) -> Mapping[str, tuple[str, ...]]:
        """Those of a layer's :meth:`fused` that are not its attention's."""
        gate_up = (GATE_UP,) if self.fused_gate_up else ("gate_proj", "up_proj")
        return {"gate_up": gate_up, "down": ("down_proj",)}

    @property
    def mlp_block(self) -> str:
        """The part of a layer that has those."""
        return "mlp"

    @property
    def layer_modules(self) -> tuple[str, ...]:
        """The modules of a layer that an adapter may target."""
        return tuple(module for modules in self.fused(0).values() for module in modules)

    def adaptable(self) -> Iterator[tuple[int, str]]:
        """Return (layer, module) of all that an adapter may target, those outside of layers first."""
        return iter(self._names)

    def module_name(self, layer: int, module: str) -> str:
        """Return PEFT's name of a module: its path in the Hugging Face model. Raises KeyError if there is no
        such module."""
        return self._names[layer, module]

    def find_module(self, name: str) -> tuple[int, str] | None:
        """Return the (layer, module) that :meth:`module_name` gives this name."""
        return self._places.get(name)

    @cached_property
    def _names(self) -> dict[tuple[int, str], str]:
        names = {(NO_LAYER, module): name for module, name in _OUTER.items()}
        for layer in range(self.num_layers):
            for linear, modules in self.fused(layer).items():
                block = "self_attn" if linear in ("qkv", "o") else self.mlp_block
                names |= {(layer, m): f"model.layers.{layer}.{block}.{m}" for m in modules}
        return names

    @cached_property
    def _places(self) -> dict[str, tuple[int, str]]:
        return {name: place for place, name in self._names.items()}

    def packed_weights(self) -> Iterator[tuple[LinearShape, Packing]]:
        """Yield the weights of :attr:`packed`, with their shapes; an embedding's is that of a head."""
        for name, packing in self.packed.items():
            place = self.find_module(name)
            assert place is not None, name
            yield self.stored_shape(place[1]), packing

    def stored_shape(self, module: str) -> LinearShape:
        """Return the shape of a module's weight as it is stored: an embedding's is that of a head."""
        return self.linear("lm_head" if module == "embed_tokens" else module)

    @property
    def plain_modules(self) -> tuple[str, ...]:
        """The modules whose weights stay as they are, whole and in the compute dtype."""
        return ()

    def kv_shapes(self) -> tuple[KVShape, ...]:
        """Return the shape of what each layer caches of a token."""
        return (
            KVShape(self.num_kv_heads, self.head_dim, self.num_kv_heads, self.head_dim),
        ) * self.num_layers

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """The weights of the norm of queries, and of that of keys."""
        return (self.q_size, self.kv_size) if self.qk_norm_whole else (self.head_dim, self.head_dim)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The rotations that there are; :meth:`rope_of` says which a layer has."""
        return (self.rope,) if self.other_rope is None else (self.rope, self.other_rope)

    def rope_of(self, layer: int) -> int:
        return int(layer in self.other_rope_layers)

    def window(self, layer: int) -> int | None:
        return self.sliding_windows[layer] if self.sliding_windows else None

    def num_parameters(self) -> int:
        """Return the number of parameters that the decoder allocates (tied embeddings counted once)."""
        linears = 0
        for linear, modules in self.fused(0).items():
            shapes = list(map(self.linear, modules))
            linears += sum(n_in * n_out for n_in, n_out in shapes)
            linears += sum(n_out for _, n_out in shapes) * self.has_bias(linear)
        norms = self.hidden_size * sum(name is not None for name in msgspec.structs.astuple(self.norms))
        norms += sum(self.qk_norm_sizes) * self.qk_norm + self.num_heads * self.sinks
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * (linears + norms) + self.hidden_size

    def weights_bytes(self, dtype_bytes: int, quantization: Quantization) -> int:
        """Return the bytes of the weights. Those of :attr:`packed` are in their packings, also where they are
        quantized while they are loaded. Else with int8, in the compiled CPU step, the linears' weights take
        a byte each, and 8 more for each output. With int4 they take half a byte each, and two more for each
        group of 32 inputs (of 16, if their number is no multiple of 32). (Until they have been loaded and
        quantized, they are in the dtype.)"""
        total = self.num_parameters() * dtype_bytes
        for (n_in, n_out), packing in self.packed_weights():
            total += packing.nbytes(n_out, n_in) - n_in * n_out * dtype_bytes
        if quantization == "none" or self.packed:
            return total
        for _, module in self.quantized_modules():
            n_in, n_out = self.stored_shape(module)
            row = n_in if quantization == "int8" else n_in // 2 + 2 * n_in // (16 if n_in % 32 else 32)
            total += n_out * (row + 8 - n_in * dtype_bytes)
        return total

    def quantized_modules(self) -> Iterator[tuple[int, str]]:
        """Yield (layer, module) of all linears whose weights ``quantization`` is for, the head's first: that
        of a tied head is the embedding."""
        yield NO_LAYER, "embed_tokens" if self.tie_embeddings else "lm_head"
        for layer in range(self.num_layers):
            for modules in self.fused(layer).values():
                yield from ((layer, module) for module in modules if module not in self.plain_modules)

    @property
    def pair_tokens(self) -> float:
        """A pair of a query and a key in all layers, in tokens through the model, by multiplications: a first
        estimate, in which all experts count."""
        heads = sum(self.num_heads * (shape.key_dim + shape.value_dim) for shape in self.kv_shapes())
        return heads / self.num_parameters()

    def kv_bytes_per_token(self, dtype_bytes: int, *, int8: bool = False) -> int:
        """Return the cache's bytes for a token, with so many for each element; in ``int8`` one for each, and
        a scale for each head."""
        shapes = self.kv_shapes()
        heads = sum(shape.key_heads + shape.value_heads for shape in shapes) * INT8_SCALE_BYTES * int8
        return sum(shape.elements for shape in shapes) * (1 if int8 else dtype_bytes) + heads
