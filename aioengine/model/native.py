"""A decoder's step as one call into the compiled CPU library, for models and settings that it covers.

The packed or quantized weights replace the loaded ones. The KV cache keeps its memory, and each block gets
the library's layout. Operations that the library does not cover run without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from aioengine.kernels import LoRABatch, LoRAPool, PlainWeight, Weight
from aioengine.kernels.blocks import BlockWeight, StackedWeight
from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.blocks import PackedBlocks
from aioengine.kernels.cpu.cores import threads
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.lora import slots_struct
from aioengine.kernels.cpu.packed import LibraryWeight, PackedWeight, pointer
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.cpu.shared_library import has_int8_products, load
from aioengine.kernels.plan.decodes import DecodeTables
from aioengine.kernels.plan.lora import segment_table
from aioengine.model.buffer import Arena
from aioengine.model.decoder import Decoder
from aioengine.model.experts.layer import Mixture
from aioengine.model.experts.spec import PLAIN, ROUTER, MixtureSpec
from aioengine.model.kv_cache import KVCache
from aioengine.model.linear import Linear
from aioengine.model.model import LastLayer, StepInputs
from aioengine.model.parallel.exchange import SUMMED, Scratch, between, exchange
from aioengine.model.rope import Ropes
from aioengine.model.spec import ModelSpec, Quantization

_LINEARS = ("qkv", "o", "gate_up", "down")
"""Linears of a layer that has no experts."""
KNOWN_POSITIONS = 2**14
"""Positions whose angles are kept, if steps need them: 8 MiB where 64 pairs are rotated."""


class NativeDecoder(Decoder):
    """A decoder whose steps are calls into the library, once :meth:`finish` was called.

    The model and the settings must be covered: see :mod:`aioengine.model.coverage`.
    """

    compiled = True

    def finish(self, quantization: Quantization) -> None:
        """Store the weights, which are loaded, as the library needs them. Nothing else is computed with them
        afterwards."""
        self.pack(_packing(quantization))
        self._library = load()
        self.seconds: Tensor | None = None
        """[phases] float64: if it is set, steps add their time in each of ``structs.PHASES``."""
        self._parallel = self.partition.shard.size > 1
        self._pools: list[LoRAPool] = []
        """Pools, by their ids in the library."""
        self._mixtures: list[structs.Mixture] = []
        """Layers refer to them."""
        self._layers = (structs.Layer * len(self.layers))(*self._layer_structs(self.cache))
        self._model = self._model_struct(self.cache)
        spec = self.spec
        inner = max(spec.mlp_sizes.values())
        self._wide = max(2 * inner, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
        self._narrow = max(inner, spec.num_heads * spec.head_dim)
        self._slices = max((len(pool.modules) for pool in self._pools), default=0)
        self._workspace: _Workspace | None = None
        """That of the last step, for as long as others are as large."""
        self._angles = KnownAngles(self.ropes)
        self._angle_sizes = len(spec.ropes), self.ropes.half
        self._finds = not self._parallel and spec.logit_divisor == 1 and spec.logit_cap is None
        """Whether steps find the most likely tokens: where nothing is done to the head's outputs."""
        self._found: tuple[Tensor, Tensor] | None = None
        """Logits of the last step and their most likely tokens, until they are asked for."""
        self._last: tuple[structs.Step, Tensor, tuple[object, ...]] | None = None
        """The last step, its logits, and what else it refers to; None if it cannot be done again."""

    def _layer_structs(self, cache: KVCache) -> list[structs.Layer]:
        found = []
        for i, layer in enumerate(self.layers):
            pools = self.slots.layers[i] if self.slots else {}
            linears = {name: linear for name, linear in layer.linears.items() if name in _LINEARS}
            mixture = None
            if layer.mixture is not None:
                mixture = self._mixture_struct(layer.mixture, pools)
                self._mixtures.append(mixture)
            norms = {place: pointer(norm) for place, norm in layer.norms.items()}
            found.append(
                structs.Layer(
                    input_norm=norms.get("attention_input"),
                    attention_norm=norms.get("attention_output"),
                    q_norm=pointer(layer.head_norms.q) if layer.head_norms else None,
                    k_norm=pointer(layer.head_norms.k) if layer.head_norms else None,
                    mlp_input_norm=norms.get("mlp_input"),
                    mlp_norm=norms.get("mlp_output"),
                    sinks=pointer(layer.sinks),
                    keys=cache.k[i].data_ptr(),
                    values=cache.v[i].data_ptr(),
                    window=self.spec.window(i) or 0,
                    rope=self.spec.rope_of(i),
                    mixture=None if mixture is None else ctypes.pointer(mixture),
                    **{name: self._matrix(linear, name) for name, linear in linears.items()},
                    **{f"lora_{name}": self._pool(pools, name) for name in linears},
                )
            )
        return found

    def _mixture_struct(self, mixture: Mixture, pools: Mapping[str, LoRAPool]) -> structs.Mixture:
        spec, linears = mixture.spec, mixture.linears
        packed = {name: linears[name] for name in linears if name not in PLAIN}
        return structs.Mixture(
            experts=spec.experts,
            per_token=spec.experts_per_token,
            size=spec.expert_size,
            normalized=int(spec.normalized),
            shared_size=spec.shared_size,
            router_bias=pointer(linears[ROUTER].bias),
            **{name: _plain(linears[name]).data_ptr() for name in PLAIN if name in linears},
            **{name.removeprefix("experts_"): self._matrix(linear, name) for name, linear in packed.items()},
            **{f"lora_{name.removeprefix('experts_')}": self._pool(pools, name) for name in linears},
        )

    def _model_struct(self, cache: KVCache) -> structs.Model:
        spec = self.spec
        return structs.Model(
            bf16=int(self.dtype == torch.bfloat16),
            layers=spec.num_layers,
            hidden=spec.hidden_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate=spec.intermediate_size,
            block_size=cache.block_size,
            int8_cache=int(cache.int8),
            rope_half=self.ropes.half,
            rope_neighbours=int(spec.rotary_neighbours),
            q_norm_size=spec.qk_norm_sizes[0],
            k_norm_size=spec.qk_norm_sizes[1],
            activation=structs.ACTIVATIONS.index(spec.activation),
            norm_rounded=int(spec.norm_offset is None),
            eps=spec.rms_norm_eps,
            norm_offset=spec.norm_offset or 0.0,
            residual_scale=spec.residual_scale,
            attention_scale=spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale,
            attention_cap=spec.attention_cap or 0.0,
            swiglu_alpha=spec.swiglu_alpha,
            swiglu_limit=spec.swiglu_limit,
            norm=self.norm.data_ptr(),
            rotations=len(spec.ropes),
            embedding=self._embedding(),
            embedding_packed=isinstance(self.embed_tokens, PackedWeight),
            head=self._matrix(self.head, "lm_head"),
            lora_head=self._pool(self.slots.outer if self.slots else {}, "lm_head"),
            slots=structs.Slots() if self.slots is None else slots_struct(self.slots.memory),
            layer=self._layers,
        )

    def forward(self, inputs: StepInputs) -> Tensor:
        self._found = self._last = None
        logits = torch.empty(len(inputs.sample_rows), self.spec.vocab_size, dtype=self.dtype)
        self._run(inputs, logits)
        if not self._finds:
            return self.finish_logits(logits)
        if self._workspace is not None:
            self._found = logits, self._workspace.best
        return logits

    def decode_again(self, tables: DecodeTables, steps: int) -> Tensor | None:
        if self._last is None or not self._finds:
            return None
        step, logits, _ = self._last
        positions = tables.positions(steps)
        if positions > step.positions or tables.known_to is not step:
            if (angles := self._angles.until(positions)) is None:
                return None
            step.angles_cos, step.angles_sin, step.positions = angles
            step.token_ids, step.spans, step.tables = tables.ids, tables.spans, tables.tables
            step.table_width, step.best = tables.width, tables.best.data_ptr()
            tables.known_to = step
        step.seconds = None if self.seconds is None else self.seconds.data_ptr()
        self._library.aio_step(ctypes.byref(self._model), ctypes.byref(step))
        self._found = logits, tables.best
        return logits

    def argmax(self, logits: Tensor) -> Tensor:
        """Return the most likely tokens, which of the last step's logits are known already, once."""
        found, self._found = self._found, None
        if found is not None and found[0] is logits:
            return found[1] if len(found[1]) == len(logits) else found[1][: len(logits)]
        return self.kernels.argmax(logits)

    def layers_forward(self, inputs: StepInputs) -> LastLayer:
        return self._run(inputs, torch.empty(0, dtype=self.dtype))

    def _run(self, inputs: StepInputs, logits: Tensor) -> LastLayer:
        """Fill in ``logits``, the head's outputs for ``inputs.sample_rows``; empty: without the head. What it
        returns is of use only then, and until the next step."""
        plan = inputs.attention
        lora, sample_lora = inputs.lora, inputs.sample_lora
        width = max(lora.width, sample_lora.width)
        space, self._last = self._workspace, None
        if space is None or space.size != (len(inputs.token_ids), width):
            space = self._workspace = None  # its memory is free before more is taken
            space = self._workspace = self._make_workspace(len(inputs.token_ids), width)
        step = space.step
        tables, spans = plan.tables, plan.span_table  # referenced while the library reads them
        segments = space.segments(lora)
        sample_segments = segments if sample_lora is lora else _Segments(sample_lora)  # of decodes the same
        step.sequences, step.table_width = tables.shape
        step.samples, step.threads = len(logits), threads()
        step.tables, step.spans, step.logits = tables.data_ptr(), spans.data_ptr(), logits.data_ptr()
        step.token_ids, step.sample_rows = inputs.token_ids.data_ptr(), inputs.sample_rows.data_ptr()
        step.lora, step.sample_lora = segments.struct, sample_segments.struct
        step.embedded = not self._embeds(lora)
        if step.embedded:
            space.hidden.copy_(self.embed(inputs))
        angles = self._angles.until(step.table_width * plan.block_size)
        if angles is None:
            for own, computed in zip(space.angles, self.ropes.cos_sin(plan.positions), strict=True):
                own.copy_(computed)
        step.angles_cos, step.angles_sin, step.positions = angles or (None, None, 0)
        step.seconds = None if self.seconds is None else self.seconds.data_ptr()
        step.best = space.best.data_ptr() if self._finds else None
        decodes = len(logits) == len(inputs.token_ids) == len(tables)
        if decodes and not (step.embedded or angles is None or self._parallel):
            self._last = step, logits, (segments, inputs)
        if not self._parallel:
            self._library.aio_step(ctypes.byref(self._model), ctypes.byref(step))
            return LastLayer(space.hidden, space.scratch.x)
        head, scratch = self.slots.outer.get("lm_head") if self.slots else None, space.scratch
        errors: list[BaseException] = []

        def between_ranks(what: int, number: int) -> int:
            """An error ends the step, and is raised after it."""
            try:
                pool = self._pools[number] if number >= 0 else None
                batch = sample_lora if pool is not None and pool is head else lora
                exchange(self.adapted, structs.Exchange(what), pool, batch, scratch)
            except BaseException as error:
                errors.append(error)
            return len(errors)

        step.exchange = structs.ExchangeFunction(between_ranks)
        self._library.aio_step(ctypes.byref(self._model), ctypes.byref(step))
        if errors:
            raise errors[0]
        return LastLayer(space.hidden, space.scratch.x)

    def _make_workspace(self, tokens: int, width: int) -> _Workspace:
        spec = self.spec
        sizes = {"hidden": spec.hidden_size, "x": spec.hidden_size, "h": self._slices * width}
        sizes |= {"wide": self._wide, "narrow": self._narrow}
        memory = {name: torch.empty(tokens, size, dtype=self.dtype) for name, size in sizes.items()}
        memory |= _mixture_scratch(spec, tokens, width, self.dtype)
        ropes, half = self._angle_sizes
        memory |= {name: torch.empty(ropes, tokens, 1, half) for name in ("cos", "sin")}
        memory |= {name: torch.empty(tokens, dtype=torch.int64) for name in ("cells", "best")}
        memory["last"] = torch.empty(tokens, dtype=torch.uint8)
        return _Workspace((tokens, width), memory)

    def _embedding(self) -> int | None:
        """Address of the embeddings, if a step begins with rows of them as they are."""
        weight = self.embed_tokens
        if self._parallel or self.spec.embedding_scale != 1:
            return None
        if isinstance(weight, (PackedWeight, PlainWeight)) and weight.data.dtype == self.dtype:
            return weight.data.data_ptr()
        return None

    def _embeds(self, batch: LoRABatch) -> bool:
        """Whether the library looks the embeddings up: no adapter of the batch changes them."""
        slots = self.slots
        if not self._model.embedding or slots is None or not batch.segments:
            return bool(self._model.embedding)
        changed = any(tokens.embeds for _, tokens in slots.trained(batch))
        return "embed_tokens" not in slots.outer and not changed

    def _matrix(self, linear: Linear, name: str) -> structs.Matrix:
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, LibraryWeight)
        if name in SUMMED and self.partition.shard.rank > 0:
            bias = None  # the ranks' outputs are added up, and one of them has it
        return weight.matrix(bias)

    def _pool(self, pools: Mapping[str, LoRAPool], name: str) -> structs.LoraPool:
        pool = pools.get(name)
        if pool is None:
            return structs.LoraPool(slices=0, id=-1)
        self._pools.append(pool)
        slices = [
            structs.LoraSlice(out, offset) for out, offset in zip(pool.widths, pool.b_offsets, strict=True)
        ]
        return structs.LoraPool(
            slices=len(slices),
            first=pool.first,
            exchange=between(name, self.adapted),
            id=len(self._pools) - 1,
            slice=(structs.LoraSlice * structs.MAX_SLICES)(*slices),
        )


class KnownAngles:
    """Cosines and sines of the first positions, of which steps in the compiled library take what they need:
    small operations of torch take longer than that."""

    def __init__(self, ropes: Ropes) -> None:
        self._ropes = ropes
        self._cos, self._sin = ropes.cos_sin(torch.arange(0))

    def until(self, positions: int) -> tuple[int, int, int] | None:
        """Return the addresses of cosines and sines, and of how many positions they are; None if steps with
        so many positions have to compute their own."""
        if positions > KNOWN_POSITIONS:
            return None
        known = self._cos.shape[1]
        if positions > known:
            known = min(max(positions, 2 * known), KNOWN_POSITIONS)
            self._cos, self._sin = self._ropes.cos_sin(torch.arange(known))
        return self._cos.data_ptr(), self._sin.data_ptr(), known


class _Workspace:
    """Memory of a step, by the fields of ``structs.Step``, and that struct, for steps of this ``size``:
    tokens, and the width of A's outputs."""

    def __init__(self, size: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        self.size = size
        self._memory = memory
        addresses = {name: tensor.data_ptr() for name, tensor in memory.items()}
        self.step: structs.Step = structs.Step(tokens=size[0], **addresses)
        self.hidden, self.best = memory["hidden"], memory["best"]
        self.angles = memory["cos"], memory["sin"]
        self.scratch = Scratch(memory["x"], memory["h"].view(-1), memory.get("rows_h"))
        self._segments: tuple[LoRABatch, _Segments] | None = None

    def segments(self, batch: LoRABatch) -> _Segments:
        """Make the batch's tables, or return those of the step before if they are the same."""
        if self._segments is not None:
            last, found = self._segments
            if (last.segments, last.affine) == (batch.segments, batch.affine):
                return found
        found = _Segments(batch)
        self._segments = batch, found
        return found


def _mixture_scratch(spec: ModelSpec, tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return memory for the experts, by the fields of ``structs.Step``."""
    if not isinstance(spec, MixtureSpec):
        return {}
    rows = tokens * spec.experts_per_token
    sizes = {"rows": spec.hidden_size, "rows_wide": 2 * spec.expert_size, "rows_narrow": spec.expert_size}
    sizes["rows_h"] = 2 * width
    found = {name: torch.empty(rows, size, dtype=dtype) for name, size in sizes.items()}
    numbers = {"scores": tokens * spec.experts, "weights": rows, "gates": tokens}
    found |= {name: torch.empty(count) for name, count in numbers.items()}
    found["routes"] = torch.empty(8 * rows + spec.experts + 1, dtype=torch.int32)
    return found


def _plain(linear: Linear) -> Tensor:
    assert isinstance(linear.weight, PlainWeight)
    return linear.weight.data


class _Segments:
    """A LoRABatch in the library's form."""

    def __init__(self, batch: LoRABatch) -> None:
        self._all, self._affine = segment_table(batch.segments), segment_table(batch.affine)
        self.struct: structs.LoraBatch = structs.LoraBatch(
            segments=self._all.data_ptr(),
            count=len(batch.segments),
            width=batch.width,
            affine=self._affine.data_ptr(),
            affine_count=len(batch.affine),
        )


def _packing(quantization: Quantization) -> Callable[[Weight], Weight]:
    """Return what packs linears: in place, or quantized one after the other into memory of their own."""
    if quantization == "none":
        return _pack
    form = QuantizedWeight if quantization == "int8" else Int4Weight
    arena = Arena()

    def quantize(weight: Weight) -> Weight:
        assert isinstance(weight, PlainWeight)
        memory = arena.take(form.packed_bytes(weight.n, weight.k))
        return form.pack(weight.data, memory, int8_activations=has_int8_products())

    return quantize


def _pack(weight: Weight) -> Weight:
    if isinstance(weight, PlainWeight):
        return PackedWeight.pack(weight.data)
    parts = weight.parts if isinstance(weight, StackedWeight) else [weight]
    packed = [PackedWeight.pack(part.data) if isinstance(part, PlainWeight) else part for part in parts]
    return PackedBlocks.pack([part for part in packed if isinstance(part, (BlockWeight, PackedWeight))])
