"""The decoder: a transformer with fused linears, on plain tensors; :class:`ModelSpec` says which one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from aioengine.kernels import LoRABatch, PlainWeight, Weight
from aioengine.kernels.backend import Backend, HeadNorms, LayerCache, Norm, Rotation, Scores
from aioengine.kernels.blocks import BlockWeight, StackedWeight
from aioengine.model.adapted import AdaptedLinears
from aioengine.model.buffer import Arena
from aioengine.model.experts.layer import Mixture
from aioengine.model.experts.spec import PLAIN, MixtureSpec
from aioengine.model.files.packing import Packing
from aioengine.model.kv_cache import KVCache
from aioengine.model.linear import Linear, WeightRows, activation
from aioengine.model.model import LastLayer, Model, StepInputs
from aioengine.model.parallel.group import Group, SoloGroup
from aioengine.model.parallel.partition import Partition
from aioengine.model.rope import Ropes
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import NO_LAYER, ModelSpec


@dataclass(slots=True)
class Layer:
    """A layer's weights."""

    linears: dict[str, Linear]
    """By the names that :meth:`ModelSpec.fused` has for them."""
    norms: dict[str, Tensor]
    """By the fields of :class:`aioengine.model.spec.NormNames`."""
    head_norms: HeadNorms | None
    sinks: Tensor | None
    """[heads]"""
    mixture: Mixture | None
    """The experts among ``linears``, if there are any."""


class _Memory:
    """Memory for the matrices of a model."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._spec, self._dtype, self._device = spec, dtype, device
        self._take = Arena(device).take

    def matrix(self, *modules: tuple[int, str]) -> Weight:
        """Return a weight of (layer, module)s that read the same input: theirs, one after the other."""
        names = [self._spec.module_name(layer, module) for layer, module in modules]
        shapes = [self._spec.stored_shape(module) for _, module in modules]
        if not any(name in self._spec.packed for name in names):
            return self._plain(sum(shape.out_features for shape in shapes), shapes[0].in_features)
        parts = []
        for name, (k, n) in zip(names, shapes, strict=True):
            packing = self._spec.packed.get(name)
            parts.append(self._plain(n, k) if packing is None else self._blocks(packing, n, k))
        return parts[0] if len(parts) == 1 else StackedWeight(parts)

    def _plain(self, n: int, k: int) -> Weight:
        return PlainWeight(self._take(n * k * self._dtype.itemsize).view(self._dtype).view(n, k))

    def _blocks(self, packing: Packing, n: int, k: int) -> Weight:
        data, groups, device = self._take(n * packing.row_bytes(k)), packing.groups(k), self._device
        scale = None
        if packing.grouped:
            kind = torch.uint8 if packing.exponents else torch.float32
            scale = torch.empty(n, groups, dtype=kind, device=device)
        return BlockWeight(
            packing.format,
            data.view(n, -1),
            k,
            self._dtype,
            scale=scale,
            zero=torch.empty(n, groups, dtype=torch.int16, device=device) if packing.zeros else None,
            group_of=torch.empty(k, dtype=torch.int32, device=device) if packing.ordered else None,
            group=packing.group or k,
            middle=packing.middle,
        )


class Decoder(Model):
    """Weights and forward pass. The weights are uninitialised until they are loaded.

    With a ``group`` of several ranks, this is one rank's share. Raises :class:`ConfigError` if the model
    ``spec`` does not divide.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Backend,
        cache: KVCache,
        slots: LoRASlots | None = None,
        group: Group | None = None,
    ) -> None:
        group = group or SoloGroup()
        self.partition = Partition(spec, group.shard)
        spec = self.partition.local
        self.cache, self.slots = cache, slots

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        memory = _Memory(spec, dtype, device)

        def linear(layer: int, fused: str) -> Linear:
            weight = memory.matrix(*((layer, module) for module in spec.fused(layer)[fused]))
            return Linear(weight, empty(weight.n) if spec.has_bias(fused) else None)

        self.spec = spec
        """Sizes of the rank's share of the model."""
        self.adapted = AdaptedLinears(kernels, group)
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.ropes = Ropes(spec, device)
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype).item()
        self._activate = activation(spec, kernels)
        self.embed_tokens = memory.matrix((NO_LAYER, "embed_tokens"))

        def layer(number: int) -> Layer:
            linears = {name: linear(number, name) for name in spec.fused(number)}
            names = msgspec.structs.asdict(spec.norms)
            mixture = None
            if isinstance(spec, MixtureSpec):
                experts = {name: linears[name] for name in spec.mlp_linears}
                mixture = Mixture(experts, spec, self.adapted, kernels, self._activate)
            q, k = map(empty, spec.qk_norm_sizes)
            return Layer(
                linears,
                {place: empty(spec.hidden_size) for place, name in names.items() if name is not None},
                HeadNorms(q, k, spec.rms_norm_eps, spec.norm_offset) if spec.qk_norm else None,
                empty(spec.num_heads) if spec.sinks else None,
                mixture,
            )

        self.layers = [layer(i) for i in range(spec.num_layers)]
        self.norm = empty(spec.hidden_size)
        head = self.embed_tokens if spec.tie_embeddings else memory.matrix((NO_LAYER, "lm_head"))
        self.head = Linear(head, None)
        self._nbytes = sum(parameter.nbytes for parameter in self.parameters().values())

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def parameters(self) -> dict[str, Tensor | BlockWeight]:
        """Return every parameter under its Hugging Face name, as a view of where it is stored, or, if it is
        quantized in the file or while it is loaded, as blocks.

        They cover the decoder's weights exactly once; a tied head appears as the embedding. To be called
        before they are packed.
        """
        out: dict[str, Tensor | BlockWeight] = {"model.norm.weight": self.norm}
        for layer_number, module, rows, bias in self._matrices():
            name = self.spec.module_name(layer_number, module)
            own = rows.weight
            out[f"{name}.weight"] = own if isinstance(own, BlockWeight) else own.rows(rows.begin, rows.end)
            if bias is not None:
                out[f"{name}.bias"] = bias
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}"
            for place, norm in layer.norms.items():
                out[f"{prefix}.{getattr(self.spec.norms, place)}.weight"] = norm
            if layer.head_norms is not None:
                out[f"{prefix}.self_attn.q_norm.weight"] = layer.head_norms.q
                out[f"{prefix}.self_attn.k_norm.weight"] = layer.head_norms.k
            if layer.sinks is not None:
                out[f"{prefix}.self_attn.sinks"] = layer.sinks
        return out

    def _matrices(self) -> Iterator[tuple[int, str, WeightRows, Tensor | None]]:
        """Yield (layer, module, weight, bias) of all matrices, a tied head's as the embedding's."""
        yield NO_LAYER, "embed_tokens", WeightRows(self.embed_tokens, 0, self.embed_tokens.n), None
        if not self.spec.tie_embeddings:
            yield NO_LAYER, "lm_head", WeightRows(self.head.weight, 0, self.head.weight.n), None
        for i in range(len(self.layers)):
            yield from self._matrices_of(i)

    def _matrices_of(self, layer: int) -> Iterator[tuple[int, str, WeightRows, Tensor | None]]:
        for fused, linear in self.layers[layer].linears.items():
            row, weight = 0, linear.weight
            for place, module in enumerate(self.spec.fused(layer)[fused]):
                end = row + self.spec.linear(module).out_features
                rows = WeightRows(weight, row, end)
                if isinstance(weight, StackedWeight):
                    rows = WeightRows(weight.parts[place], 0, end - row)
                yield layer, module, rows, None if linear.bias is None else linear.bias[row:end]
                row = end

    def base_weight(self, layer: int, module: str) -> tuple[WeightRows, Tensor | None]:
        """Return a weight, of which ``partition.outputs`` and ``inputs`` say what a rank has."""
        if layer == NO_LAYER:
            weight = self.embed_tokens if module == "embed_tokens" else self.head.weight
            held = len(range(self.partition.whole.vocab_size)[self.partition.vocabulary])
            return WeightRows(weight, 0, held, turned=module == "embed_tokens"), None
        return next((rows, bias) for _, name, rows, bias in self._matrices_of(layer) if name == module)

    def pack(self, pack: Callable[[Weight], Weight]) -> None:
        """Store the weights of all linears in another form, one after the other."""
        for layer in self.layers:
            for name, linear in layer.linears.items():
                if name not in PLAIN:
                    self._nbytes += linear.pack(pack)
        tied = self.head.weight is self.embed_tokens
        if tied:
            self.embed_tokens = PlainWeight(self.norm)  # or it would be kept beside its packed copy
        self._nbytes += self.head.pack(pack)
        if tied:
            self.embed_tokens = self.head.weight
        elif isinstance(self.embed_tokens, BlockWeight):
            self.embed_tokens = pack(self.embed_tokens)

    def embed(self, inputs: StepInputs) -> Tensor:
        """Return the hidden state [T, hidden] that the first layer gets."""
        slots = self.slots
        pool = slots.outer.get("embed_tokens") if slots else None
        first = self.partition.vocabulary.start
        hidden = self.adapted.embed(inputs.token_ids, self.embed_tokens, first, pool, inputs.lora)
        for part, tokens in slots.trained(inputs.lora) if slots else ():
            if tokens.embeds:
                tokens.embed(inputs.token_ids[part], hidden[part])
        return hidden if self._embedding_scale == 1 else hidden.mul_(self._embedding_scale)

    def layers_forward(self, inputs: StepInputs) -> LastLayer:
        cache, slots = self.cache, self.slots
        spec, plan, kernels = self.spec, inputs.attention, self.kernels
        angles = zip(*self.ropes.cos_sin(plan.positions), strict=True)
        rotations = [Rotation(cos, sin, spec.rotary_neighbours) for cos, sin in angles]
        hidden = self.embed(inputs)
        delta: Tensor | None = None  # what is yet to be added to hidden, together with the next norm
        begin, end = self.adapted.split_outputs, self.adapted.split_inputs
        tokens = hidden.shape[0]
        for i, layer in enumerate(self.layers):
            pools, lora = slots.layers[i] if slots else {}, inputs.lora
            linears, norm = layer.linears, layer.norms.get
            kv = LayerCache(cache.k[i], cache.v[i])

            x = self._sum(hidden, delta, norm("attention_input"))
            qkv = begin(linears["qkv"], x, pools.get("qkv"), lora).view(tokens, -1, spec.head_dim)
            kernels.rope_store(qkv, layer.head_norms, rotations[spec.rope_of(i)], kv, plan)
            scores = Scores(spec.window(i), spec.attention_scale, spec.attention_cap, layer.sinks)
            attended = kernels.paged_attention(qkv, kv, plan, scores)
            delta = end(linears["o"], attended, pools.get("o"), lora)
            delta = self._sum(delta, None, norm("attention_output"))

            x = self._sum(hidden, delta, norm("mlp_input"))
            if layer.mixture is not None:
                delta = layer.mixture.forward(x, pools, lora)
            else:
                x = self._activate(begin(linears["gate_up"], x, pools.get("gate_up"), lora))
                delta = end(linears["down"], x, pools.get("down"), lora)
            delta = self._sum(delta, None, norm("mlp_output"))
        return LastLayer(hidden, delta)

    def _sum(self, hidden: Tensor, delta: Tensor | None, norm: Tensor | None) -> Tensor:
        """Add ``delta`` to ``hidden`` in place, and return its norm, if there is one."""
        spec = self.spec
        if norm is not None:
            of = Norm(norm, spec.rms_norm_eps, spec.norm_offset)
            return self.kernels.add_rms_norm(hidden, delta, of, spec.residual_scale)
        return hidden if delta is None else hidden.add_(delta, alpha=spec.residual_scale)

    def logits(self, last: LastLayer, rows: Tensor, lora: LoRABatch) -> Tensor:
        x, slots = self.normed(last, rows), self.slots
        head = slots.outer.get("lm_head") if slots else None
        logits = self.adapted.split_outputs(self.head, x, head, lora)
        for part, tokens in slots.trained(lora) if slots else ():
            if tokens.has_logits:
                tokens.logits(x[part], logits[part], self.kernels)
        return self.finish_logits(logits)

    def normed(self, last: LastLayer, rows: Tensor) -> Tensor:
        hidden = last.hidden.index_select(0, rows)
        delta = None if last.delta is None else last.delta.index_select(0, rows)
        return self._sum(hidden, delta, self.norm)

    def finish_logits(self, logits: Tensor) -> Tensor:
        """Return the logits [N, vocab] on every rank, made of the ranks' parts of the head's outputs, which
        are overwritten."""
        if self.spec.logit_divisor != 1:
            logits.div_(self.spec.logit_divisor)
        if self.spec.logit_cap is not None:
            self.kernels.soft_cap_(logits, self.spec.logit_cap)
        if self.partition.shard.size == 1:
            return logits
        vocabulary = self.partition.whole.vocab_size
        if not len(logits):
            return logits.new_empty(0, vocabulary)
        return self.adapted.group.all_gather(logits)[:, :vocabulary]
