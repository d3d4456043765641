"""Gain and shift of DoRA and ``lora_bias``, against the formula."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from aioengine.adapters.peft.dora import output_affine, rows_of, squares
from aioengine.errors import AdapterInvalid
from aioengine.kernels.weight import PlainWeight
from aioengine.model.linear import WeightRows

KEY = (0, "q_proj")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(48, 40), (3, 70_000), (70_000, 32)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_the_rows_of_a_weight_in_any_layout(
    shape: tuple[int, int], transposed: bool, dtype: torch.dtype
) -> None:
    n_out, n_in = shape
    weight = randn(n_in, n_out).to(dtype).T if transposed else randn(n_out, n_in).to(dtype)
    rows = WeightRows(PlainWeight(weight.T), 0, n_in, turned=True) if transposed else WeightRows.of(weight)
    a, b = randn(4, n_in, seed=1).to(dtype), randn(n_out, 4, seed=2).to(dtype)
    expected = (weight.double() + b.double() @ a.double()).square().sum(1)
    torch.testing.assert_close(squares(rows, a, b), expected.float(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("base_bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_gain_and_shift_give_the_adapted_linear(base_bias: bool, dora: bool, lora_bias: bool) -> None:
    weight, a, b, x = randn(8, 6), randn(2, 6, seed=1), randn(8, 2, seed=2), randn(5, 6, seed=3)
    bias = randn(8, seed=4) if base_bias else None
    magnitude, trained_bias = randn(8, seed=5).abs() + 0.5, randn(8, seed=6)
    adapter = SimpleNamespace(
        computed={KEY: (a, b)},
        magnitudes={KEY: magnitude} if dora else {}, biases={KEY: trained_bias} if lora_bias else {},
    )  # fmt: skip
    rows = rows_of(adapter, lambda *key: {KEY: (WeightRows.of(weight), bias)}[key], adapter.magnitudes)
    found = output_affine(adapter, rows, torch.float32)
    assert found.keys() == ({KEY} if dora or lora_bias else set())
    gain, shift = found.get(KEY, torch.zeros(2, 8))

    adapted = weight + b @ a
    if dora:
        adapted = adapted * (magnitude / adapted.norm(dim=1))[:, None]
    expected = x @ adapted.T
    if bias is not None:
        expected += bias
    if lora_bias:
        expected += trained_bias
    y = torch.nn.functional.linear(x, weight + b @ a, bias)
    torch.testing.assert_close(y + gain * y + shift, expected)


def test_a_scale_close_to_one_survives_bfloat16() -> None:
    weight = randn(8, 16)
    adapter = SimpleNamespace(
        computed={KEY: (torch.zeros(1, 16), torch.zeros(8, 1))},
        magnitudes={KEY: weight.norm(dim=1) * 1.0003}, biases={},
    )  # fmt: skip
    rows = rows_of(adapter, lambda *_: (WeightRows.of(weight), None), adapter.magnitudes)
    found = output_affine(adapter, rows, torch.bfloat16)
    torch.testing.assert_close(found[KEY][0].float(), torch.full((8,), 3e-4), rtol=0.01, atol=0)


def test_what_is_not_finite_is_refused_with_its_place() -> None:
    adapter = SimpleNamespace(
        computed={KEY: (torch.zeros(1, 6), torch.zeros(8, 1))},
        magnitudes={KEY: torch.ones(8)}, biases={},
    )  # fmt: skip
    rows = rows_of(adapter, lambda *_: (WeightRows.of(torch.zeros(8, 6)), None), adapter.magnitudes)
    with pytest.raises(AdapterInvalid, match=r"q_proj of layer 0.*not finite"):
        output_affine(adapter, rows, torch.float32)
