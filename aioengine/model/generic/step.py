"""The step that is under way, as the modules of a model see it: its tokens, and the caches that transformers
gets in the place of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from aioengine.kernels import AttentionPlan, Backend, LoRABatch, Rotation
from aioengine.kernels.plan.attention import locate
from aioengine.kernels.portable.cells import put, take
from aioengine.model.kv_cache import KVCache

Allowed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' mask functions: ``allowed(batch, head, query position, key position)``, broadcast, bool."""


class Unsuitable(Exception):
    """Error for a model whose attention the engine cannot replace."""


@dataclass(slots=True)
class Step:
    lora: LoRABatch
    """The tokens that go through the linears, by adapter slot."""
    plan: AttentionPlan | None = None
    """None: no layer attends (the head alone)."""
    rotations: dict[int, Rotation] = field(default_factory=dict)
    """Those that layers with heads of a size share, which leave everything where it is."""


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
        self._windows: dict[int, int | None] = {}

    def window(self, layer: int, allowed: Allowed | None, device: torch.device) -> int | None:
        """Return how many keys a layer's queries see, by transformers' number of it; None: all before them.
        Raises :class:`Unsuitable` for any other mask."""
        if layer not in self._windows:
            self._windows[layer] = _window(allowed, self.longest, device)
        return self._windows[layer]


def _window(allowed: Allowed | None, longest: int, device: torch.device) -> int | None:
    """Classify a mask function by its answers for some positions below ``longest``."""
    if allowed is None:
        return None
    every = torch.arange(longest, device=device)
    some = torch.cat([every[:64], every[:: max(1, longest // 64)], every[-64:]])
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    seen = allowed(zero, zero, some[:, None], every[None]).expand(len(some), longest)
    causal = every[None] <= some[:, None]
    if torch.equal(seen, causal):
        return None
    window = int(seen[-1].sum())
    if not torch.equal(seen, causal & (every[None] > some[:, None] - window)):
        raise Unsuitable("a mask is neither causal nor a sliding window")
    return window


class KeepsMore(Exception):
    """Error for a model that keeps something other than keys and values."""


class EngineCache(Cache):
    """Layers that hold keys and values, and nothing else."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise KeepsMore("it keeps the states of recurrences or convolutions, or an index")

    update_conv_state = update_recurrent_state = update_indexer = _refuse
    get_conv_state = get_recurrent_state = has_previous_state = _refuse


class PassingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call] # transformers has no types for it
    """Returns its inputs unchanged, because the attention stores the keys and values. ``past`` is the number
    of tokens before those of the pass."""

    is_sliding = False

    def __init__(self, past: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self.past = self.length = past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class Pages:
    """One sequence of a step: the cells of its new tokens, and of all of them."""

    def __init__(self, plan: AttentionPlan, index: int) -> None:
        row, length, self.past = plan.spans[index]
        every = torch.arange(self.past + length)
        self.cells = plan.cells[row : row + length]
        self.context = locate(plan.host_tables, plan.block_size, torch.tensor(index), every).to(plan.device)


class GatheringLayer(PassingLayer):  # type: ignore[no-untyped-call] # as above
    """Stores into a layer's pages, and gathers the sequence's keys and values from them."""

    def __init__(self, pages: Pages, keys: Tensor, values: Tensor) -> None:
        super().__init__(pages.past)
        self._pages, self._keys, self._values = pages, keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        pages = self._pages
        put(self._keys, pages.cells, key_states[0].transpose(0, 1))
        put(self._values, pages.cells, value_states[0].transpose(0, 1))
        self.length = len(pages.context)
        self.keys = take(self._keys, pages.context).transpose(0, 1)[None]
        self.values = take(self._values, pages.context).transpose(0, 1)[None]
        return self.keys, self.values


def gathering(cache: KVCache, layer_ids: tuple[int, ...], layers: int, pages: Pages) -> EngineCache:
    """Return a cache for one sequence and attention of the model's own."""
    made: list[Any] = [PassingLayer() for _ in range(layers)]
    for i, layer in enumerate(layer_ids):
        made[layer] = GatheringLayer(pages, cache.k[i], cache.v[i])
    return EngineCache(layers=made)


def run(module: Any, token_ids: Tensor, positions: Tensor, cache: Cache) -> Any:
    """Call a model, or its body, with ``token_ids`` and ``positions`` [T] and what it takes of the others."""
    names = inspect.signature(module.forward).parameters
    arguments: dict[str, Any] = {"input_ids": token_ids[None], "use_cache": True}
    if (name := next((name for name in ("cache", "past_key_values") if name in names), None)) is not None:
        arguments[name] = cache
    if "position_ids" in names:
        arguments["position_ids"] = positions[None]
    return module(**arguments)
