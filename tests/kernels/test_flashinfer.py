"""Attention by FlashInfer: what it is told of a step. A stand-in computes what its description says."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import kernels_reference as reference
from support.fake_cuda import FakeCuda
from support.layer_cases import LayerCase, close, run
from support.tiny_models import build_model
from torch import Tensor

from aioengine.kernels import (
    AttentionPlan,
    Backend,
    LayerCache,
    Scores,
    available_backends,
    dispatch,
    get_backend,
    measured,
    triton,
)
from aioengine.kernels.measured import AttentionCase
from aioengine.kernels.portable import plain
from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec

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
            mine = torch.tensor(indices[pages[i] : pages[i + 1]], device=q.device)
            length = (len(mine) - 1) * page_size + last[i]
            k, v = (cache[mine].flatten(0, 1)[:length].float() for cache in paged_kv_cache)
            k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
            queries = q[rows[i] : rows[i + 1]].float()
            at = torch.arange(length - len(queries), length, device=q.device)[:, None]
            key = torch.arange(length, device=q.device)
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
    assert available_backends("cuda") == ["triton", "torch", "flashinfer"]
    assert get_backend("cuda").name == "triton"
    assert get_backend("cuda", "flashinfer").name == "flashinfer"
    dispatch._flashinfer_backend.cache_clear()
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    sys.modules.pop("aioengine.kernels.triton.flashinfer")
    vars(triton).pop("flashinfer")
    assert "flashinfer" not in available_backends("cuda")
    dispatch._flashinfer_backend.cache_clear()


# The choice between it and Triton

CASE = AttentionCase(4, 2, 64, 16, torch.bfloat16, (Scores(), Scores(5)))
CUDA = torch.device("cuda")


class Time:
    """A clock that only attention moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """A backend whose attention takes the next of these seconds in each layer, and then the last."""

    def __init__(self, name: str, clock: Time, *seconds: float, fails: int = -1) -> None:
        self.name, self._clock, self._seconds, self._fails = name, clock, list(seconds), fails
        self.asked: list[tuple[int, Scores]] = []

    def paged_attention(self, qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> Tensor:
        assert qkv.shape == (measured.TOKENS, 8, 64) and qkv.dtype == cache.keys.dtype == torch.bfloat16
        (span,) = plan.spans
        blocks = plan.host_tables[0].tolist()
        assert len(blocks) * 16 >= span.start + span.length and max(blocks) < len(cache.keys)
        if len(self.asked) == self._fails:
            raise RuntimeError("nvcc was not found")
        self.asked.append((span.start, scores))
        self._clock.now += self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]
        return qkv


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "TOKENS", 32)


@pytest.mark.parametrize(("theirs", "chosen"), [(2e-3, "flashinfer"), (4e-3, "triton")])
def test_the_faster_one_attends(
    theirs: float, chosen: str, few_tokens: None, caplog: pytest.LogCaptureFixture
) -> None:
    """What it takes to compile does not count, nor does one slow turn."""
    caplog.set_level(logging.INFO, "aioengine")
    clock = Time()
    first = [60.0, *[theirs] * 9, 100.0]
    ours, library = Timed("triton", clock, 3e-3), Timed("flashinfer", clock, *first, theirs)
    best = measured.fastest([ours, library], CASE, torch.device("cpu"), clock)  # type: ignore[list-item]
    assert best.name == chosen
    assert ours.asked == library.asked and ours.asked[:4] == [
        (start, scores) for start in (0, 32) for scores in CASE.layers
    ]
    total = 4e3 * theirs
    assert f"triton 12.00 ms, flashinfer {total:.2f} ms" in caplog.text
    assert f"{chosen} is used" in caplog.text


@pytest.mark.parametrize("fails", [0, 5])
def test_one_that_fails_is_left_out(fails: int, few_tokens: None, caplog: pytest.LogCaptureFixture) -> None:
    clock = Time()
    library = Timed("flashinfer", clock, 1e-3, fails=fails)
    both = [Timed("triton", clock, 3e-3), library]
    assert measured.fastest(both, CASE, torch.device("cpu"), clock).name == "triton"  # type: ignore[arg-type]
    assert len(library.asked) == fails and caplog.text.count("nvcc was not found") == 1
    with pytest.raises(RuntimeError, match="nvcc"):
        measured.fastest(both[::-1], CASE, torch.device("cpu"), clock)  # type: ignore[arg-type]


def test_it_is_measured_where_nobody_names_a_backend(
    backend: Any, few_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it computes all that the model asks for."""
    from aioengine.kernels.triton import backend as ours

    clock = Time()
    monkeypatch.setattr(ours, "paged_attention", Timed("triton", clock, 3.0).paged_attention)
    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.delenv("AIOENGINE_KERNELS", raising=False)
    dispatch._flashinfer_backend.cache_clear()
    with FakeCuda() as world:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: world.stream.synchronize())
        assert dispatch.fastest_backend(CUDA, CASE).name == "flashinfer"
        assert Wrapper.made == 2  # one for each window
        for layers in ((Scores(soft_cap=3.0),), (Scores(), Scores(scale=0.1))):
            assert dispatch.fastest_backend(CUDA, CASE._replace(layers=layers)).name == "triton"
        assert dispatch.fastest_backend(CUDA, CASE._replace(head_dim=80)).name == "triton"
        monkeypatch.setenv("AIOENGINE_KERNELS", "triton")
        assert dispatch.fastest_backend(CUDA, CASE).name == "triton"
        assert Wrapper.made == 2


@pytest.mark.parametrize("changes", [{"kernels": "torch"}, {"kv_cache_dtype": "fp8"}, {"device": "cpu"}, {}])
def test_a_model_asks_with_its_own_shapes(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AttentionCase] = []

    def fastest(device: torch.device, case: AttentionCase) -> Backend:
        asked.append(case)
        return get_backend("cuda", "torch")

    monkeypatch.setattr("aioengine.model.cuda.attention.fastest_backend", fastest)
    monkeypatch.setenv("AIOENGINE_KERNELS", "torch")
    model = build_model(tmp_path, "mistral", num_hidden_layers=2, sliding_window=9)
    spec = read_spec(model)
    options = {"device": "cuda", "kernels": None, **changes}
    with FakeCuda():
        runner = build_runner(
            *(spec, model), dtype=torch.bfloat16, num_blocks=4, block_size=16, **options
        )  # fmt: skip
        assert runner.kernels == "torch"
        del runner
    expected = AttentionCase(
        spec.num_heads, spec.num_kv_heads, spec.head_dim, 16, torch.bfloat16, (Scores(9), Scores(9))
    )
    assert asked == ([] if changes else [expected])
