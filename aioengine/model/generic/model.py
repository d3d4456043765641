"""A model of transformers as the runner sees it: a step's inputs in, logits out.

First everything except the head is called, for all tokens of the step, and then the head, for the tokens
whose logits are needed. The second call is one of the whole model, in which the first result stands in the
place of what the body computes. So the model also applies its own changes to the logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.kernels import Backend, LoRABatch
from aioengine.model.generic import attention
from aioengine.model.generic.adapters import EXPERTS, Adapters
from aioengine.model.generic.classes import TransformersClass
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.generic.step import (
    EngineCache,
    Holder,
    Pages,
    PassingLayer,
    Step,
    gathering,
    run,
)
from aioengine.model.generic.trace import Implementations
from aioengine.model.generic.weights import StoredWeight, linear_matrix, pack_weights
from aioengine.model.kv_cache import KVCache
from aioengine.model.linear import WeightRows
from aioengine.model.model import LastLayer, Model, StepInputs
from aioengine.model.slots.pool import LoRASlots


class GenericModel(Model):
    """A model of transformers on the engine's cache, batches and adapters.

    ``slots`` None: no adapters. ``longest`` is the number of positions that a sequence may have.

    It is to be probed before it is used: :func:`aioengine.model.generic.probe.check`.
    Raises ConfigError if the weights cannot be loaded.
    """

    def __init__(
        self,
        spec: GenericSpec,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Backend,
        cache: KVCache,
        slots: LoRASlots | None,
        longest: int,
        progress: LoadProgress | None = None,
    ) -> None:
        if progress is not None:
            progress("Loading weights with transformers", 0, 1)
        found = TransformersClass(path)
        self.spec: GenericSpec = spec
        self.path = path
        self.dtype, self.device = dtype, device
        self.kernels, self.cache, self.slots = kernels, cache, slots
        self.model: Any = found.load(dtype, device)
        self._layers = found.text_config.num_hidden_layers
        self._body = _body_of(self.model)
        self._result: Any = None
        """Last output of the body."""
        self.holder = Holder(cache, spec.layer_ids, kernels, longest)
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                module.aioengine = self.holder
        attention.register()
        self.adapters = Adapters(self.model, spec, slots, self.holder)
        self._implementations = Implementations(self.model)
        self.flat = spec.flat
        self.use_flat(spec.flat)

    def pack(self) -> None:
        """Pack the weights of the linears and experts for the compiled library, if that computes."""
        if self.kernels.name == "cpu":
            pack_weights(self.model, self.spec)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.model.parameters())

    def use_flat(self, flat: bool) -> None:
        """Compute all sequences of a step side by side, with the engine's attention, or one by one, with the
        model's own."""
        self.flat = flat
        self._implementations.use(attention=attention.NAME if flat else None, experts=EXPERTS)

    def alone(self, tokens: list[int]) -> Tensor:
        """Compute logits [n, vocab] in one pass, as transformers does."""
        self._implementations.use(attention=None, experts=None)
        try:
            out = self.model(input_ids=torch.tensor([tokens], device=self.device), use_cache=False)
        finally:
            self.use_flat(self.flat)
        return _logits(out)

    def base_weight(self, layer: int, module: str) -> tuple[WeightRows, Tensor | None]:
        linear = self.model.get_submodule(self.spec.module_name(layer, module))
        stored, bias = linear.weight, None if linear.bias is None else linear.bias.detach()
        if isinstance(stored, StoredWeight):
            return WeightRows(stored.weight, 0, stored.weight.n), bias
        return WeightRows.of(linear_matrix(linear)), bias

    def layers_forward(self, inputs: StepInputs) -> LastLayer:
        try:
            hidden = self._flat(inputs) if self.flat else self._one_by_one(inputs)
        finally:
            self.holder.step = None
        return LastLayer(hidden, None)

    def logits(self, last: LastLayer, rows: Tensor, lora: LoRABatch) -> Tensor:
        if not len(rows):
            return torch.empty(0, self.spec.vocab_size, dtype=self.dtype, device=self.device)
        result = _with_hidden(self._result, last.hidden.index_select(0, rows)[None])
        self.holder.step, self._body.forward = Step(lora), lambda *_, **__: result
        try:
            out = self.model(input_ids=torch.zeros(1, len(rows), dtype=torch.long, device=self.device))
        finally:
            self.holder.step = None
            del self._body.forward
        return _logits(out)

    def normed(self, last: LastLayer, rows: Tensor) -> Tensor:
        return last.hidden.index_select(0, rows)

    def _flat(self, inputs: StepInputs) -> Tensor:
        """Return all tokens of the step as one row."""
        self.holder.step = Step(inputs.lora, inputs.attention)
        cache = EngineCache(layers=[PassingLayer() for _ in range(self._layers)])
        return self._run(inputs.token_ids, inputs.attention.positions, cache)

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
        self._result = run(self._body, token_ids, positions, cache)
        hidden: Tensor = self._result[0]
        return hidden[0]


def _with_hidden(result: Any, hidden: Tensor) -> Any:
    """Return a body's result, with ``hidden`` [1, N, size] in the place of what it gave."""
    if isinstance(result, tuple):
        return (hidden, *result[1:])
    result = copy.copy(result)
    result["last_hidden_state"] = hidden
    return result


def _logits(out: Any) -> Tensor:
    logits: Tensor = out[0] if isinstance(out, tuple) else out.logits
    return logits[0]


def part_of(lora: LoRABatch, begin: int, end: int) -> LoRABatch:
    """Return the batch of the tokens ``begin..end-1``, which are one sequence's."""
    own, affine = (
        [s._replace(start=0, stop=end - begin) for s in segments if s.start <= begin < s.stop]
        for segments in (lora.segments, lora.affine)
    )
    return LoRABatch.of(own, affine, end - begin, lora.device)


def _body_of(model: Any) -> Any:
    """Return the submodule that does all but the head."""
    parts: list[Any] = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    inner = [part for part in parts if part is not model]
    if not inner:
        raise ConfigError(f"{type(model).__name__} has no separate body and head, which the engine needs")
    return inner[0].get_decoder()  # of OPT's, say, the head's model calls a part
