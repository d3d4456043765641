"""A model as the runner sees it, whatever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from aioengine.kernels import AttentionPlan, Backend, LoRABatch
from aioengine.kernels.plan.decodes import DecodeTables
from aioengine.model.kv_cache import KVCache
from aioengine.model.linear import WeightRows
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import ModelSpec


@dataclass(slots=True)
class LastLayer:
    """Output of the last layer for T tokens; :meth:`Model.logits` turns it into logits."""

    hidden: Tensor
    """[T, hidden]"""
    delta: Tensor | None
    """[T, hidden], yet to be added to ``hidden``."""


@dataclass(slots=True)
class StepInputs:
    """One step over T tokens; all tensors on the model's device."""

    token_ids: Tensor
    """[T]"""
    sample_rows: Tensor
    """[N] the token rows whose next token is wanted."""
    attention: AttentionPlan
    lora: LoRABatch
    """The tokens by adapter slot."""
    sample_lora: LoRABatch
    """The same for ``sample_rows``."""


class Model(ABC):
    """Weights, KV cache and adapter slots of a model, or of a rank's share of it, and what computes with
    them. ``slots`` is None without adapters."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    kernels: Backend
    cache: KVCache
    slots: LoRASlots | None
    compiled = False
    """Whether a step is one call into the compiled library."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weights."""

    @abstractmethod
    def layers_forward(self, inputs: StepInputs) -> LastLayer:
        """Return all layers, up to the last norm and the head."""

    @abstractmethod
    def logits(self, last: LastLayer, rows: Tensor, lora: LoRABatch) -> Tensor:
        """Return the logits of the tokens ``rows`` [N], whose adapters ``lora`` has: [N, vocab] in the
        compute dtype, on every rank."""

    @abstractmethod
    def normed(self, last: LastLayer, rows: Tensor) -> Tensor:
        """Return the hidden states of the tokens ``rows`` [n] after the last norm: [n, hidden]."""

    @abstractmethod
    def base_weight(self, layer: int, module: str) -> tuple[WeightRows, Tensor | None]:
        """Return weight [out, in] and bias [out] of what LoRA can target; an embedding transposed.

        Of several ranks, each has its part.
        """

    def forward(self, inputs: StepInputs) -> Tensor:
        """Return the logits of ``inputs.sample_rows``: [N, vocab] in the compute dtype, on every rank."""
        return self.logits(self.layers_forward(inputs), inputs.sample_rows, inputs.sample_lora)

    def decode_again(self, tables: DecodeTables, steps: int) -> Tensor | None:
        """Decode with the sequences of the last step, which was a decode step, too: what ``tables`` has now.
        Returns the logits, whose ``argmax`` is in ``tables.found``; None if ``forward`` has to do it."""
        return None

    def argmax(self, logits: Tensor) -> Tensor:
        """Do what the backend's ``argmax`` does."""
        return self.kernels.argmax(logits)
