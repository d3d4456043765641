"""A model of transformers as the runner sees it: a step's inputs in, logits out.

First everything except the head is called, for all tokens of the step, and then the head, for the tokens
whose logits are needed. The second call is one of the whole model, in which the first result replaces the
body's. So the model also applies its own changes to the logits.
"""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.kernels import AttentionPlan, Backend, LoRABatch, Span
from aioengine.model.decoder import LastLayer, StepInputs
from aioengine.model.generic import attention
from aioengine.model.generic.adapted.linears import base_weight, hook
from aioengine.model.generic.adapted.parameters import hook_parameters
from aioengine.model.generic.caches import Pages, gathering, passing
from aioengine.model.generic.classes import Found
from aioengine.model.generic.quantized import Blocks, LibraryForms
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.generic.step import Holder, Step
from aioengine.model.generic.trace import Attention, cache_argument
from aioengine.model.kv_cache import KVCache
from aioengine.model.linear import WeightRows
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import Quantization

if TYPE_CHECKING:
    from aioengine.model.generic.layers import WholeLayers
    from aioengine.model.generic.packing import PackedLinears
    from aioengine.model.generic.recognised import Recognised
    from aioengine.model.generic.rotation import PutOffRotations

logger = logging.getLogger("aioengine")


class Way(NamedTuple):
    """Which of the engine's own parts compute."""

    flat: bool
    """All sequences of a step side by side, with the engine's attention. Otherwise one by one, with the
    model's."""
    packed: bool = False
    """Linears on the CPU library."""
    recognised: bool = False
    """Modules whose work the engine knows, by its operations."""
    put_off: bool = False
    """The rotation, together with the attention."""
    whole: bool = False
    """Layers whose work the engine knows, each in one call."""


WAYS = (
    *(Way(True, True, True, True, True), Way(True, True, True, True), Way(True, True, True), Way(True, True)),
    *(Way(False, True, True), Way(False, True), Way(True), Way(False)),
)
"""The ways to compute, the fastest first."""


class GenericModel:
    """A model of transformers on the engine's cache, batches and adapters.

    ``slots`` None: no adapters. ``longest`` is the number of positions that a sequence may have.
    ``quantization`` is what the CPU library does to the linears, and None if the spec packs them.

    It is to be probed before it is used: :func:`aioengine.model.generic.probe.check`.
    Raises ConfigError if the weights cannot be loaded, or not be quantized here.
    """

    def __init__(
        self,
        spec: GenericSpec,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Backend,
        cache: KVCache,
        slots: LoRASlots | None,
        longest: int,
        quantization: Quantization = "none",
        progress: LoadProgress | None = None,
    ) -> None:
        library = kernels.name == "cpu" and dtype in (torch.float32, torch.bfloat16)
        if quantization != "none" and not library:
            raise ConfigError(
                f"quantization={quantization!r}: on a CPU only the compiled library has it, which needs a "
                "C++ compiler (docs/kernels.md) and dtype 'bfloat16' or 'float32'; set quantization='none'"
            )
        if progress is not None:
            progress("Loading weights with transformers", 0, 1)
        found = Found(path)
        self.spec = spec
        self.path = path
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.cache = cache
        self.slots = slots
        self.longest = longest
        # Only what stays as it is goes to the device in the dtype.
        self.model: Any = found.load(dtype, torch.device("cpu") if spec.packed else device)
        self._attention = Attention(self.model)
        self.modules: dict[str, Any] = dict(self.model.named_modules())
        self._layers = found.text_config.num_hidden_layers
        self.body_name = _body_name(self.model)
        body = self.modules[self.body_name]
        self._cache_name = cache_argument(body.forward)
        self._takes_positions = "position_ids" in inspect.signature(body.forward).parameters
        self._result: Any = None
        """Last output of the body; it is returned again while the head is called."""
        self.holder = Holder(cache, spec.layer_ids)
        attends = attention.Attends(self.holder, kernels, longest)
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                module.aioengine = attends
        self.hooks = hook(self.model, spec, slots, self.holder, kernels)
        self.bare_hooks = hook_parameters(self.modules, spec, slots, self.holder, kernels)
        attention.register()
        self._packed: PackedLinears | None = None
        self._blocks: Blocks | None = None
        self._library, self._quantization = library, quantization
        self._stays_packed = library and (bool(spec.packed) or quantization != "none")
        self.rounds = False
        """Whether linears round their inputs to int8."""
        self.nbytes = sum(parameter.nbytes for parameter in self.model.parameters())
        """Bytes of the weights."""
        if self._stays_packed:
            self.nbytes += self._pack().nbytes_added
        elif spec.packed:
            self._blocks = Blocks(self.model, spec, self.hooks, self.holder, kernels, device)
            self.nbytes += self._blocks.nbytes_added
        self._recognised: Recognised | None = None
        self._rotations: PutOffRotations | None = None
        self._whole: WholeLayers | None = None
        self.way = Way(spec.flat)
        self.use_own_attention(not spec.flat)

    def ways(self) -> list[Way]:
        """Return the ways in which it may compute, the fastest first."""
        usual = [way for way in WAYS if way.flat <= self.spec.flat]
        if self._stays_packed:
            return [way for way in usual if way.packed]
        return [way for way in usual if not way.packed or self._library]

    def take(self, way: Way) -> None:
        """Compute in this way from now on."""
        packed = None if way.packed else self._packed
        for shortcut in (self._whole, self._rotations, self._recognised, packed):
            if shortcut is not None:
                shortcut.undo()
        self._whole = self._rotations = self._recognised = None
        if not way.packed:
            self._packed = None
        elif self._packed is None:
            self._pack()
        if way.recognised and self._packed is not None:
            from aioengine.model.generic.recognised import Recognised

            self._recognised = Recognised(self.modules, self._packed.by_name, self.holder, self.kernels)
        if way.put_off:
            from aioengine.model.generic.rotation import PutOffRotations

            self._rotations = PutOffRotations(self.modules, self.holder)
        if way.whole:
            from aioengine.model.generic.layers import WholeLayers

            self._whole = WholeLayers(self.modules, self.holder, rounds=self.rounds)
        self.way = way
        self.use_own_attention(not way.flat)

    def _pack(self) -> PackedLinears:
        from aioengine.model.generic.packing import PackedLinears

        forms = LibraryForms(self.spec, self._quantization, self.dtype)
        self.rounds = forms.rounds
        self._packed = PackedLinears(self.modules, self.spec, self.hooks, self.holder, self.kernels, forms)
        return self._packed

    def use_own_attention(self, own: bool) -> None:
        """Whether the model attends by itself."""
        self._attention.use(None if own else attention.NAME)

    def base_weight(self, layer: int, module: str) -> tuple[WeightRows, Tensor | None]:
        """Return a weight of the base model, as :meth:`Decoder.base_weight` does."""
        name = self.spec.module_name(layer, module)
        packed = None if self._packed is None else self._packed.by_name.get(name)
        if packed is not None:
            return WeightRows.of(packed.weight()), packed.bias()
        blocks = None if self._blocks is None else self._blocks.by_name.get(name)
        if blocks is not None:
            return WeightRows(blocks.weight, 0, blocks.weight.n), blocks.bias
        weight, bias = base_weight(self.modules[name])
        return WeightRows.of(weight), bias

    def forward(self, inputs: StepInputs) -> Tensor:
        """Return the logits of ``inputs.sample_rows``: [N, vocab] in the compute dtype."""
        return self.logits(self.layers_forward(inputs), inputs.sample_rows, inputs.sample_lora)

    def layers_forward(self, inputs: StepInputs) -> LastLayer:
        """Return all but the head."""
        try:
            hidden = self._flat(inputs) if self.way.flat else self._one_by_one(inputs)
        finally:
            self.holder.step = None
        return LastLayer(hidden, None)

    def logits(
        self, last: LastLayer, rows: Tensor, lora: LoRABatch, slots: LoRASlots | None = None
    ) -> Tensor:
        """Return the logits of the tokens ``rows`` [N], whose adapters ``lora`` has: [N, vocab]."""
        if not len(rows):
            return torch.empty(0, self.spec.vocab_size, dtype=self.dtype, device=self.device)
        result = self._with_hidden(last.hidden.index_select(0, rows)[None])
        body = self.modules[self.body_name]
        self.holder.step, body.forward = Step(lora), lambda *_, **__: result
        try:
            out = self.model(input_ids=torch.zeros(1, len(rows), dtype=torch.long, device=self.device))
        finally:
            self.holder.step = None
            del body.forward
        logits: Tensor = out[0] if isinstance(out, tuple) else out.logits
        return logits[0]

    def normed(self, last: LastLayer, rows: Tensor) -> Tensor:
        """Return the hidden states of the tokens ``rows`` [N], as the head gets them: [N, hidden]."""
        return last.hidden.index_select(0, rows)

    def _flat(self, inputs: StepInputs) -> Tensor:
        """Return all tokens of the step as one row."""
        self.holder.step = Step(inputs.lora, inputs.attention)
        return self._run(inputs.token_ids, inputs.attention.positions, passing(self._layers))

    def _one_by_one(self, inputs: StepInputs) -> Tensor:
        """Run each sequence as a row of its own."""
        plan = inputs.attention
        parts = []
        for i, (row, length, _) in enumerate(plan.spans):
            self.holder.step = Step(part_of(inputs.lora, row, row + length))
            cache = gathering(self.cache, self.spec.layer_ids, self._layers, Pages(plan, i))
            part = slice(row, row + length)
            parts.append(self._run(inputs.token_ids[part], plan.positions[part], cache))
        return torch.cat(parts)

    def _run(self, token_ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": token_ids[None], "use_cache": True}
        if self._cache_name is not None:
            arguments[self._cache_name] = cache
        if self._takes_positions:
            arguments["position_ids"] = positions[None]
        body = self.modules[self.body_name]
        result = body(**arguments)
        self._result = result
        hidden: Tensor = result[0]
        return hidden[0]

    def _with_hidden(self, hidden: Tensor) -> Any:
        """Return the body's last result, with ``hidden`` [1, N, size] in the place of what it gave."""
        if isinstance(self._result, tuple):
            return (hidden, *self._result[1:])
        result = copy.copy(self._result)
        result["last_hidden_state"] = hidden
        return result


def part_of(lora: LoRABatch, begin: int, end: int) -> LoRABatch:
    """Return the batch of the tokens ``begin..end-1``, which are one sequence's."""
    own, affine = (
        [s._replace(start=0, stop=end - begin) for s in segments if s.start <= begin < s.stop]
        for segments in (lora.segments, lora.affine)
    )
    return LoRABatch.of(own, affine, end - begin, lora.device)


def inputs_of(
    model: GenericModel, work: list[tuple[list[int], int, list[int], int]], ranks: list[int]
) -> StepInputs:
    """Return a step in which all tokens' logits are wanted. ``work``: each sequence's new tokens, where they
    start, its block table and slot, sorted by slot."""
    ids: list[int] = []
    spans = []
    for tokens, start, _, _ in work:
        spans.append(Span(len(ids), len(tokens), start))
        ids += tokens
    device = model.device
    slots, counts = [slot for *_, slot in work], [len(tokens) for tokens, *_ in work]
    lora = LoRABatch(slots, counts, ranks, device)
    return StepInputs(
        token_ids=torch.tensor(ids, device=device),
        sample_rows=torch.arange(len(ids), device=device),
        attention=AttentionPlan(spans, [table for _, _, table, _ in work], model.cache.block_size, device),
        lora=lora,
        sample_lora=lora,
    )


def _body_name(model: Any) -> str:
    """Return the submodule that does all but the head: the first one of transformers' kind that is called."""
    from transformers import PreTrainedModel

    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel)
    ]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:
        raise ConfigError(f"{type(model).__name__} cannot run one token: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise ConfigError(f"{type(model).__name__} has no separate body and head, which the engine needs")
    return called[0]
