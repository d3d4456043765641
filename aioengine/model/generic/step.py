"""The step that is under way, as the modules of a model see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import AttentionPlan, Backend, LoRABatch
from aioengine.model.kv_cache import KVCache

Allowed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' mask functions: ``allowed(batch, head, query position, key position)``, broadcast, bool."""


class MaskKind(NamedTuple):
    """Which keys a layer's queries see: all before them, the last ``window``, or what ``allowed`` says."""

    window: int | None = None
    odd: bool = False
    """Only ``allowed`` knows; it comes with each step's mask."""


@dataclass(slots=True)
class Step:
    lora: LoRABatch
    """The tokens that go through the linears, by adapter slot."""
    plan: AttentionPlan | None = None
    """None: no layer attends (the head alone)."""
    made: dict[Any, Any] = field(default_factory=dict)
    """Values that layers share in this step."""


class Holder:
    """State that the hooks of one model share. ``longest`` is the number of positions of a sequence."""

    def __init__(self, cache: KVCache, layer_ids: tuple[int, ...], kernels: Backend, longest: int) -> None:
        self.cache = cache
        self.index = {layer: i for i, layer in enumerate(layer_ids)}
        self.kernels = kernels
        self.longest = longest
        self.step: Step | None = None
        self.plain = False
        """Whether the adapter in slot 0 is added to all rows, as two products: the probe compares with
        that."""
        self._kinds: dict[int, MaskKind] = {}

    def mask_kind(self, layer: int, allowed: Allowed | None, device: torch.device) -> MaskKind:
        """Return the kind of mask of a layer, by transformers' number of it."""
        if layer not in self._kinds:
            self._kinds[layer] = _classified(allowed, self.longest, device)
        return self._kinds[layer]


def _classified(allowed: Allowed | None, longest: int, device: torch.device) -> MaskKind:
    """Classify a mask function by its answers for some positions below ``longest``."""
    if allowed is None:
        return MaskKind()
    every = torch.arange(longest, device=device)
    some = torch.cat([every[:64], every[:: max(1, longest // 64)], every[-64:]])
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    seen = allowed(zero, zero, some[:, None], every[None]).expand(len(some), longest)
    causal = every[None] <= some[:, None]
    if torch.equal(seen, causal):
        return MaskKind()
    window = int(seen[-1].sum())
    if torch.equal(seen, causal & (every[None] > some[:, None] - window)):
        return MaskKind(window)
    return MaskKind(odd=True)
