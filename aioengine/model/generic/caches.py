"""Caches that are given to transformers in place of its own: an empty one, or the pages of one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from aioengine.kernels import AttentionPlan
from aioengine.kernels.plan.attention import locate
from aioengine.kernels.portable.cells import put, take
from aioengine.model.kv_cache import KVCache


class KeepsMore(Exception):
    """Error for a model that keeps something other than keys and values."""


class EngineCache(Cache):
    """Layers that hold keys and values, and nothing else."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise KeepsMore("it keeps the states of recurrences or convolutions, or an index")

    update_conv_state = update_recurrent_state = update_indexer = _refuse
    get_conv_state = get_recurrent_state = has_previous_state = _refuse


class PassingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call] # transformers has no types for it
    """Returns its inputs unchanged, because the attention stores the keys and values."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

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


class GatheringLayer(CacheLayerMixin):  # type: ignore[no-untyped-call] # transformers has no types for it
    """Stores into a layer's pages, and gathers the sequence's keys and values from them."""

    is_sliding = False

    def __init__(self, pages: Pages, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self._pages = pages
        self._keys, self._values = keys, values
        self._length = pages.past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        pages = self._pages
        put(self._keys, pages.cells, key_states[0].transpose(0, 1))
        put(self._values, pages.cells, value_states[0].transpose(0, 1))
        self._length = len(pages.context)
        self.keys = take(self._keys, pages.context).transpose(0, 1)[None]
        self.values = take(self._values, pages.context).transpose(0, 1)[None]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._pages.past + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def _passing_layer() -> PassingLayer:
    return PassingLayer()  # type: ignore[no-untyped-call] # its base has no types


def passing(layers: int) -> EngineCache:
    """Return a cache for attention that keeps keys and values itself."""
    return EngineCache(layers=[_passing_layer() for _ in range(layers)])


def gathering(cache: KVCache, layer_ids: tuple[int, ...], layers: int, pages: Pages) -> EngineCache:
    """Return a cache for one sequence and attention of the model's own."""
    made: list[Any] = [_passing_layer() for _ in range(layers)]
    for i, layer in enumerate(layer_ids):
        made[layer] = GatheringLayer(pages, cache.k[i], cache.v[i])
    return EngineCache(layers=made)
