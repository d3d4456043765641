"""Products with quantized checkpoints' weights in Triton, against weights that are expanded in float64.

In Triton's interpreter, by way of ``test_triton.py``, or on a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.quantized_checkpoints import Quantize, awq, float8, gptq, write_quantized
from support.random_blocks import copy, random_codes
from support.step_runs import StepRun
from support.tiny_models import build_model
from support.triton_here import DEVICE, needs_triton
from torch import Tensor

from aioengine.kernels import ExpertPlan
from aioengine.kernels.blocks import BlockWeight, StackedWeight
from aioengine.kernels.portable.dequantize import codes, scales
from aioengine.kernels.weight import PlainWeight
from aioengine.model.files.quantized import with_quantization
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import ModelSpec, Quantization

blocks = pytest.importorskip("aioengine.kernels.triton.blocks")
experts = pytest.importorskip("aioengine.kernels.triton.experts")
pytestmark = needs_triton
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest value: that of rounding the result, and of summing in float32."""


def weight_of(format: str, n: int, k: int, group: int, seed: int, **options: Any) -> BlockWeight:
    """Every code may appear; of float8 all that are numbers."""
    return copy(random_codes(format, n, k, seed, group=group, **options), DEVICE)


def from_byte(begin: int, data: Tensor) -> Tensor:
    """The same in memory of its own, from this byte after a multiple of 64 on."""
    memory = torch.empty(64 + begin + data.numel(), dtype=torch.uint8, device=data.device)
    return memory[-memory.data_ptr() % 64 + begin :][: data.numel()].view(data.shape).copy_(data)


def expanded(weight: BlockWeight) -> Tensor:
    """[n, k] float64, never rounded to the weight's dtype unless inputs are ordered."""
    assert weight.scale is not None
    group = weight.group_of
    if group is None:
        group = torch.arange(weight.k, device=weight.data.device) // weight.group
    group = group.long()
    zero = weight.middle if weight.zero is None else weight.zero.double()[:, group]
    whole = (codes(weight.format, weight.data).double() - zero) * scales(weight.scale).double()[:, group]
    return whole if weight.group_of is None else whole.to(weight.dtype).double()


@given(st.data())
def test_products_are_those_of_the_expanded_weight(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(list(blocks.FORMATS)))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    k = data.draw(st.sampled_from([32, 96, 128, 256, 320]))
    group = data.draw(st.sampled_from([g for g in (32, 64, 128, k) if k % g == 0]))
    zeros = format in ("int4", "int8") and data.draw(st.booleans())
    ordered = zeros and data.draw(st.booleans())
    n, rows = data.draw(st.sampled_from([1, 16, 40, 70])), data.draw(st.sampled_from([1, 5, 17, 66]))
    seed = data.draw(st.integers(0, 1000))
    weight = weight_of(format, n, k, group, seed, zeros=zeros, ordered=ordered, dtype=dtype)
    assert blocks.covers(weight)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, k + 16, generator=generator).to(dtype).to(DEVICE)
    x = wide[:, :k] if data.draw(st.booleans()) else wide[:, :k].contiguous()
    bias = torch.randn(n, generator=generator).to(dtype).to(DEVICE) if data.draw(st.booleans()) else None
    y = blocks.linear(x, weight, bias)
    expected = x.double() @ expanded(weight).T + (0 if bias is None else bias.double())
    assert y.dtype == dtype and y.shape == (rows, n)
    error = (y.double() - expected).abs().max() / expected.abs().max()
    # Each weight is rounded where inputs are ordered, which the interpreter does to bfloat16 by cutting.
    assert error < TOLERANCE[dtype] * (2 if ordered else 1)


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    formats=st.lists(st.sampled_from([*blocks.FORMATS, "plain"]), min_size=1, max_size=2),
    biased=st.booleans(),
    begin=st.sampled_from([0, 0, 16, 1, 8]),
    seed=st.integers(0, 1000),
)
def test_experts_are_multiplied_by_their_own_weights(
    counts: list[int], formats: list[str], biased: bool, begin: int, seed: int
) -> None:
    """Each of the experts has as many parts; some have no rows, or all of them none. Where the last one's
    codes ``begin`` between vectors, which nothing but their addresses says, the kernel does not read them."""
    k, out, generator = 64, 24 * len(formats), torch.Generator().manual_seed(seed)
    parts: list[BlockWeight | PlainWeight] = []
    for i, format in enumerate(formats * len(counts)):
        if format == "plain":
            parts.append(PlainWeight(torch.randn(24, k, generator=generator).to(DEVICE)))
        else:
            parts.append(weight_of(format, 24, k, 32, seed + i, zeros=False))
    if isinstance(parts[-1], BlockWeight):
        parts[-1] = dataclasses.replace(parts[-1], data=from_byte(begin, parts[-1].data))
        assert StackedWeight(parts).addresses is None or begin % 16 == 0
    whole = torch.cat([expanded(p) if isinstance(p, BlockWeight) else p.data.double() for p in parts])
    x = torch.randn(sum(counts), k, generator=generator).to(DEVICE)
    bias = torch.randn(len(whole), generator=generator).to(DEVICE) if biased else None
    chosen = torch.repeat_interleave(torch.tensor(counts, device=DEVICE))[:, None]
    plan = ExpertPlan(chosen, len(counts))
    found = experts.expert_linear(x, StackedWeight(parts), bias, plan)
    if StackedWeight(parts).addresses is not None:
        assert "groups" not in vars(plan), "the host knows no counts"
    assert found.shape == (len(x), out)
    for e, (rows, ours) in enumerate(zip(x.split(counts), found.split(counts), strict=True)):
        own = slice(e * out, (e + 1) * out)
        expected = rows.double() @ whole[own].T + (0 if bias is None else bias[own].double())
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-3)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """Not even if they are not finite. Few rows and many are cut in the same way along the inputs."""
    weight = weight_of("int4", 70, 256, 64, 0)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    alone = blocks.linear(x[:3], weight, None)
    x[5:] = float("nan")
    beside = blocks.linear(x, weight, None)
    torch.testing.assert_close(beside[:3], alone, rtol=1e-5, atol=1e-5)
    assert beside[5:].isnan().all() and not beside[:5].isnan().any()


def test_parts_of_a_fused_linear_are_written_beside_each_other() -> None:
    """Also one that no kernel covers, and a plain one."""
    few = weight_of("int8", 40, 48, 16, 0, zeros=False)
    assert not blocks.covers(few)
    parts = [
        weight_of("int4", 24, 48, 48, 1),
        few,
        PlainWeight(torch.randn(8, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE)),
        weight_of("fp8", 16, 48, 48, 3),
    ]
    whole, bias = StackedWeight(parts), torch.arange(88.0, device=DEVICE)
    x = torch.randn(20, 48, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    expected = torch.cat([part.linear(x, None) for part in parts], 1) + bias
    torch.testing.assert_close(blocks.linear(x, whole, bias), expected, rtol=1e-4, atol=1e-2)
    assert blocks.linear(x[:0], whole, bias).shape == (0, 88)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
QUANTIZED: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "gptq": (gptq(), {**GPTQ, "desc_act": False}),
    "gptq, ordered": (gptq(ordered=True), {**GPTQ, "desc_act": True}),
    "awq": (awq(), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    "float8 in blocks": (
        float8((32, 32)),
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
    ),
}


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_a_model_that_is_quantized_while_it_is_loaded(form: Quantization, tmp_path: Path) -> None:
    """Through the kernel, its logits are those that torch makes of the same codes, but for the rounding of
    activations to eight bits."""
    model = build_model(tmp_path / "model", "llama", num_hidden_layers=1)
    spec = with_quantization(read_spec(model), form, "cuda")
    logits = [logits_of(model, spec, kernels) for kernels in ("triton", "torch")]
    if form == "int4":
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.1
    exact = logits_of(model, read_spec(model), "torch")
    off = (logits[0] - exact).norm() / exact.norm()
    assert 1e-4 < off < {"int8": 0.05, "int4": 0.4, "fp8": 0.2}[form]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_model_with_adapters_is_exact_relative_to_what_its_checkpoint_stands_for(
    name: str, tmp_path: Path
) -> None:
    quantize, config = QUANTIZED[name]
    pair = write_quantized(tmp_path, quantize, config, num_hidden_layers=1)
    packed = logits_of(pair.packed, read_spec(pair.packed), "triton")
    expanded = logits_of(pair.expanded, read_spec(pair.expanded), "torch")
    torch.testing.assert_close(packed, expanded, rtol=1e-3, atol=1e-3)


def logits_of(path: Path, spec: ModelSpec, kernels: str) -> Tensor:
    """Logits of a base row and of two with adapters, through the kernel if there are blocks and Triton."""
    run = StepRun(
        *(path, (8, 3)), affine=1, spec=spec, device=DEVICE, num_blocks=16, block_size=16, kernels=kernels
    )  # fmt: skip
    if kernels == "triton":
        linears = run.runner.model.layers[0].linears.values()
        parts = [part for linear in linears for part in getattr(linear.weight, "parts", [linear.weight])]
        assert all(isinstance(part, BlockWeight) and blocks.covers(part) for part in parts)
    ids = list(range(5, 25))
    return run.execute([(slot, 0, ids[i:], [2 * i, 2 * i + 1]) for i, slot in enumerate((-1, 0, 1))])
