"""The step that is under way, as the modules of a model see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import AttentionPlan, LoRABatch, Rotation
from aioengine.model.kv_cache import KVCache

Allowed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' mask functions: ``allowed(batch, head, query position, key position)``, broadcast, bool."""


class Kind(NamedTuple):
    """Which keys a layer's queries see: all before them, the last ``window``, or what ``allowed`` says."""

    window: int | None = None
    odd: bool = False
    """Only ``allowed`` knows; it comes with each step's mask."""


class Turn(NamedTuple):
    """Rotation of a layer's queries and keys that is yet to be done."""

    query: Tensor
    key: Tensor
    rotation: Rotation
    own: Callable[[], tuple[Tensor, Tensor]]
    """Returns them rotated, as the model would have done it."""
    by: tuple[Tensor, Tensor]
    """Cosines and sines, as the model has them."""
    convert: Callable[[Step, int, Tensor, Tensor], Rotation | None]
    """Makes the rotation of heads of a size, out of a step's cosines and sines."""


@dataclass(slots=True)
class Step:
    lora: LoRABatch
    """The tokens that go through the linears, by adapter slot."""
    plan: AttentionPlan | None = None
    """None: no layer attends (the head alone)."""
    shrunk: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Last input of each pool, by its id, and the products of the pool's A matrices with it."""
    turn: Turn | None = None
    """The rotation that was put off last."""
    made: dict[Any, Any] = field(default_factory=dict)
    """Values that layers share in this step."""


class Holder:
    """State that all hooked modules of one model share."""

    def __init__(self, cache: KVCache, layer_ids: tuple[int, ...]) -> None:
        self.cache = cache
        self.index = {layer: i for i, layer in enumerate(layer_ids)}
        self.kinds: dict[int, Kind] = {}
        """Kind of mask, by transformers' number of the layer."""
        self.step: Step | None = None
        self.seen: list[Any] | None = None
        """What a layer's modules do, in order, while somebody watches it."""
        self.expanded = False
        """Whether quantized weights are expanded, and multiplied by torch: how the probe says what is
        right."""


def kind_of(allowed: Allowed | None, longest: int, device: torch.device) -> Kind:
    """Classify a mask function by its answers for some positions below ``longest``."""
    if allowed is None:
        return Kind()
    every = torch.arange(longest, device=device)
    some = torch.cat([every[:64], every[:: max(1, longest // 64)], every[-64:]])
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    seen = allowed(zero, zero, some[:, None], every[None]).expand(len(some), longest)
    causal = every[None] <= some[:, None]
    if torch.equal(seen, causal):
        return Kind()
    window = int(seen[-1].sum())
    if torch.equal(seen, causal & (every[None] > some[:, None] - window)):
        return Kind(window)
    return Kind(odd=True)
