"""A KV cache of float8 (e4m3fn): torch and Triton store the same bytes, and attend to what they mean.

``test_triton.py`` runs this file in Triton's interpreter, too, and on a machine with a GPU it runs there.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.layer_cases import Layer, LayerCase, close, run
from support.step_runs import StepRun
from support.tiny_models import build_model
from torch import Tensor

from aioengine.config import EngineConfig
from aioengine.kernels import AttentionPlan, Backend, HeadNorms, LayerCache, Rotation, Span, get_backend
from aioengine.kernels.portable import plain as reference
from aioengine.memory_plan import plan_memory
from aioengine.model.files.resolve import read_spec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NAME = "triton" if INTERPRETED or DEVICE == "cuda" else "torch"
BACKEND = get_backend(DEVICE, NAME)


class Rounding:
    """Plain torch, over a cache in whose place numbers are rounded to float8."""

    name = "rounding"
    paged_attention = staticmethod(reference.paged_attention)

    @staticmethod
    def rope_store(
        qkv: Tensor, norms: HeadNorms | None, rotation: Rotation, cache: LayerCache, plan: AttentionPlan
    ) -> None:
        reference.rope_store(qkv, norms, rotation, cache, plan)
        fresh = qkv[:, -2 * cache.keys.shape[2] :]  # prompts that begin attend to these
        for tensor in (*cache, fresh):
            tensor.copy_(tensor.to(torch.float8_e4m3fn).to(tensor.dtype))


class Narrow(Layer):
    """A layer whose cache has float8 numbers, and codes that are none where nothing was stored."""

    def __init__(self, case: LayerCase, device: str = "cpu") -> None:
        super().__init__(case, device)
        keys, values = torch.full((2, *self.cache.keys.shape), 0x7F, dtype=torch.uint8, device=device)
        self.cache = LayerCache(keys, values)


HEAD = 256
"""Values of a head: many, because in the interpreter each token takes the same time."""


def stored(values: Tensor) -> Tensor:
    """The bytes that a cache has of values, which are not rotated."""
    d = HEAD
    rows = values.view(-1, d)
    tokens = len(rows)
    qkv = torch.zeros(tokens, 3, d, dtype=values.dtype, device=DEVICE)
    qkv[:, 2] = rows
    ones = torch.ones(tokens, 1, d // 2, device=DEVICE)
    turned = Rotation(ones, torch.zeros_like(ones))
    blocks = -(-tokens // 16)
    keys, found = torch.zeros(2, blocks, 16, 1, d, dtype=torch.uint8, device=DEVICE)
    plan = AttentionPlan([Span(0, tokens, 0)], [list(range(blocks))], 16, DEVICE)
    with np.errstate(invalid="ignore"):  # values are rotated, too, before the keys are chosen
        BACKEND.rope_store(qkv, None, turned, LayerCache(keys, found), plan)
    return found.view(-1, d)[:tokens].view(values.shape).cpu()


def test_every_bfloat16_is_stored_as_the_nearest_float8() -> None:
    """Of two the even one; what is larger than the largest as that one; and NaN for what is not finite."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    found = stored(values.to(DEVICE)).view(torch.float8_e4m3fn)
    expected = values.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    finite = values.isfinite()
    assert found.view(torch.uint8)[finite].equal(expected.view(torch.uint8)[finite])
    assert found.float()[~finite].isnan().all()


def test_float32_is_rounded_once() -> None:
    """Around the middle of two numbers, and where steps change."""
    numbers = torch.arange(126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    edges = torch.cat([numbers, middles, -middles])
    around = torch.cat([torch.nextafter(edges, edges + s) for s in (-1.0, 1.0)] + [edges])
    values = torch.cat([around, around.new_zeros(-len(around) % HEAD)])
    expected = values.to(torch.float8_e4m3fn).view(torch.uint8)
    assert stored(values.to(DEVICE)).equal(expected)


CASES = [
    LayerCase([(0, 5), (17, 1), (40, 20)]),
    LayerCase([(70, 1), (3, 1)], heads=8, kv_heads=1, head_dim=80, window=9, norms=True),
    LayerCase([(0, 33), (9, 2)], head_dim=32, soft_cap=5.0, sinks=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES)
def test_attention_is_to_the_rounded_keys_and_values(
    case: LayerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle: Backend = Rounding()  # type: ignore[assignment]
    expected = run(oracle, case, DEVICE)
    monkeypatch.setattr("support.layer_cases.Layer", Narrow)
    close(run(BACKEND, case, DEVICE), expected)


def test_logits_are_close_and_a_value_that_is_not_finite_is_seen(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "llama", num_hidden_layers=2)
    found, tokens = {}, list(range(5, 26))
    for fp8 in (False, True):
        run = StepRun(
            model, device=DEVICE, num_blocks=16, block_size=16, kernels=NAME,
            kv_cache_dtype="fp8" if fp8 else "auto",
        )  # fmt: skip
        found[fp8] = run.execute([(-1, 0, tokens[:20], [0, 1])])
        if fp8:
            cache = run.runner.kv_cache
            assert cache.nbytes * 4 == 16 * 16 * 2 * 2 * 2 * 16 * 4  # a quarter of float32's
            cache.v[0][0, 3] = 0x7F
            assert run.execute([(-1, 20, tokens, [0, 1])]).isnan().all()
    off = (found[True] - found[False]).norm() / found[False].norm()
    assert 1e-4 < off < 0.1


def test_the_plan_has_half_the_bytes_of_16_bits(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "llama")
    spec = read_spec(model)
    half, whole = (
        plan_memory(
            spec, EngineConfig(model=str(model), dtype="bfloat16", device="cuda", kv_cache_dtype=kind),
            device="cuda", available_bytes=2**33,
        )
        for kind in ("fp8", "auto")
    )  # fmt: skip
    assert 2 * half.block_bytes == whole.block_bytes
    assert "fp8" in next(detail for label, detail, _ in half.rows() if label == "KV blocks")
