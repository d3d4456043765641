"""The backend ``flashinfer``: Triton's, with attention by FlashInfer (Ye et al., 2025, arXiv:2501.01005).

It is optional, and used if it is named or faster (:mod:`aioengine.kernels.measured`). It compiles its kernels
at first use, which needs a CUDA compiler. It computes the attention of prompts and mixed steps. Decode steps
that are played back keep the Triton kernel, whose plan is made on the device; FlashInfer's plan is made by
the host before each step.
"""

from __future__ import annotations

import threading
from itertools import accumulate
from typing import Any

import flashinfer
import torch
from torch import Tensor

from aioengine.kernels.backend import LayerCache, Scores
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.triton import attention
from aioengine.kernels.triton.backend import add_rms_norm as add_rms_norm
from aioengine.kernels.triton.backend import argmax as argmax
from aioengine.kernels.triton.backend import clamped_swiglu as clamped_swiglu
from aioengine.kernels.triton.backend import expert_linear as expert_linear
from aioengine.kernels.triton.backend import gelu_and_mul as gelu_and_mul
from aioengine.kernels.triton.backend import linear as linear
from aioengine.kernels.triton.backend import lora_affine as lora_affine
from aioengine.kernels.triton.backend import lora_embed as lora_embed
from aioengine.kernels.triton.backend import lora_expand as lora_expand
from aioengine.kernels.triton.backend import lora_shrink as lora_shrink
from aioengine.kernels.triton.backend import rope_store as rope_store
from aioengine.kernels.triton.backend import silu_and_mul as silu_and_mul
from aioengine.kernels.triton.backend import soft_cap_ as soft_cap_

name = "flashinfer"
capturable = True

HEAD_DIMS = (64, 128, 256)
"""Head sizes that FlashInfer has kernels for; others, and float32, use the Triton kernels, and so do scores
that a model scales or caps in its own way, or that have sinks."""
_WORKSPACE = 128 * 2**20
"""Bytes for partial results; FlashInfer's documentation recommends this number."""

_mine = threading.local()
"""A thread's wrappers, which hold the plan of a step: a model steps in one thread."""


def covers(dtype: torch.dtype, head_dim: int, scores: Scores) -> bool:
    """Whether FlashInfer computes this, and not Triton in its place."""
    usual = scores.scale is None and scores.soft_cap is None and scores.sinks is None
    return usual and head_dim in HEAD_DIMS and dtype != torch.float32


def forget() -> None:
    """Free this thread's wrappers and their memory, where they are not used any more."""
    _mine.__dict__.clear()


def paged_attention(qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> Tensor:
    """Attend to what is stored; see :class:`aioengine.kernels.backend.Backend`."""
    kv_heads, d = cache.keys.shape[2:]
    if not plan.spans or not covers(qkv.dtype, d, scores):
        return attention.paged_attention(qkv, cache, plan, scores)
    heads = qkv.shape[1] - 2 * kv_heads
    planned = plan.derive(_Planned)
    found: Tensor = planned.of(scores.window, heads, cache.keys).run(
        qkv[:, :heads].contiguous(), tuple(cache)
    )
    return found.flatten(1)


class _Planned:
    """A step's plan by window, made when a layer first asks for it."""

    def __init__(self, plan: AttentionPlan) -> None:
        stops = [span.start + span.length for span in plan.spans]  # not the plan itself, which holds this
        pages = [-(-stop // plan.block_size) for stop in stops]
        self._metadata = (
            _indptr([span.length for span in plan.spans]),
            _indptr(pages),
            torch.cat([plan.host_tables[i, :count] for i, count in enumerate(pages)]),
            _int32([(stop - 1) % plan.block_size + 1 for stop in stops]),
        )
        self._made: dict[int | None, Any] = {}

    def of(self, window: int | None, heads: int, keys: Tensor) -> Any:
        """Return the planned wrapper for layers with this window."""
        if window not in self._made:
            _, block_size, kv_heads, d = keys.shape
            wrapper = _wrapper(window, keys.device)
            wrapper.plan(
                *self._metadata,
                *(heads, kv_heads, d, block_size),
                causal=True,
                window_left=-1 if window is None else window - 1,
                q_data_type=keys.dtype,
                kv_data_type=keys.dtype,
            )
            self._made[window] = wrapper
        return self._made[window]


def _wrapper(window: int | None, device: torch.device) -> Any:
    """Return this thread's wrapper for a window, because layers with different windows need different
    plans."""
    wrappers: dict[tuple[int | None, torch.device], Any] = _mine.__dict__.setdefault("wrappers", {})
    if (window, device) not in wrappers:
        workspaces: dict[torch.device, Tensor] = _mine.__dict__.setdefault("workspaces", {})
        if device not in workspaces:
            workspaces[device] = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        wrappers[window, device] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspaces[device], "NHD")
    return wrappers[window, device]


def _indptr(counts: list[int]) -> Tensor:
    """Return [len + 1] offsets: the beginning of each part, and the end of the last one."""
    return _int32([0, *accumulate(counts)])


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
