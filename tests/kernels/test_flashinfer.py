"""Attention by FlashInfer: what it is told of a step. A stand-in computes what its description says."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.layer_cases import LayerCase, close, run
from torch import Tensor

from aioengine.kernels import LayerCache, available_backends, dispatch, get_backend, reference, triton
from aioengine.kernels.portable import plain

pytest.importorskip("triton")


class Wrapper:
    """``BatchPrefillWithPagedKVCacheWrapper`` of FlashInfer 0.7, as far as it is used."""

    made = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        Wrapper.made += 1

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        tensors = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(t.dtype == torch.int32 and t.device.type == "cpu" for t in tensors)
        assert causal and kv_data_type == q_data_type
        self.planned = [t.tolist() for t in tensors]
        self.shape = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        self.window_left, self.dtype = window_left, q_data_type

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        heads, kv_heads, d, page_size = self.shape
        rows, pages, indices, last = self.planned
        assert q.shape == (rows[-1], heads, d) and q.is_contiguous() and q.dtype == self.dtype
        out = torch.empty_like(q)
        for i in range(len(rows) - 1):
            mine = indices[pages[i] : pages[i + 1]]
            length = (len(mine) - 1) * page_size + last[i]
            k, v = (cache[mine].flatten(0, 1)[:length].float() for cache in paged_kv_cache)
            k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
            queries = q[rows[i] : rows[i + 1]].float()
            at = torch.arange(length - len(queries), length)[:, None]
            key = torch.arange(length)
            seen = (key <= at) & ((self.window_left < 0) | (key >= at - self.window_left))
            scores = torch.einsum("thd,khd->htk", queries, k) / d**0.5
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            out[rows[i] : rows[i + 1]] = torch.einsum("htk,khd->thd", weights, v).to(q.dtype)
        return out


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the cache written by plain torch, in the same layout; its other operations need a GPU."""
    stand_in = ModuleType("flashinfer")
    stand_in.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    sys.modules.pop("aioengine.kernels.triton.flashinfer", None)
    module = importlib.import_module("aioengine.kernels.triton.flashinfer")
    Wrapper.made = 0
    yield SimpleNamespace(rope_store=plain.rope_store, paged_attention=module.paged_attention)
    sys.modules.pop("aioengine.kernels.triton.flashinfer", None)
    vars(triton).pop("flashinfer", None)
    dispatch._flashinfer_backend.cache_clear()


@pytest.mark.parametrize("window", [None, 1, 7])
def test_it_is_told_what_the_reference_computes(backend: Any, window: int | None) -> None:
    spans = [(0, 1), (15, 1), (16, 1), (31, 2), (0, 40), (5, 30)]
    case = LayerCase(spans, heads=6, kv_heads=2, head_dim=64, window=window, dtype=torch.bfloat16)
    close(run(backend, case), run(reference, case))
    assert Wrapper.made == 1, "a step's plan is its own, the wrapper is not"


def test_what_it_has_no_kernels_for_is_left_to_triton(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from aioengine.kernels.triton import attention

    asked: list[torch.Size] = []

    def ours(qkv: Tensor, cache: LayerCache, *_: object) -> Tensor:
        asked.append(cache.keys.shape)
        return qkv.new_zeros(len(qkv), 1)

    monkeypatch.setattr(attention, "paged_attention", ours)
    run(backend, LayerCase([(0, 2)], head_dim=80, dtype=torch.bfloat16))
    run(backend, LayerCase([(0, 2)], head_dim=64, dtype=torch.float32))
    run(backend, LayerCase([(0, 2)], head_dim=64, dtype=torch.bfloat16, soft_cap=3.0))
    assert len(asked) == 6 and Wrapper.made == 0


def test_it_is_there_when_asked_for(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.delenv("AIOENGINE_KERNELS", raising=False)
    dispatch._flashinfer_backend.cache_clear()
    assert available_backends("cuda") == ["triton", "torch", "reference", "flashinfer"]
    assert get_backend("cuda").name == "triton"
    assert get_backend("cuda", "flashinfer").name == "flashinfer"
    dispatch._flashinfer_backend.cache_clear()
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    sys.modules.pop("aioengine.kernels.triton.flashinfer")
    vars(triton).pop("flashinfer")
    assert "flashinfer" not in available_backends("cuda")
    dispatch._flashinfer_backend.cache_clear()
