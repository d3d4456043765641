"""The experts' linears and the adapters on them: every backend against plain torch.

``test_triton.py`` runs this file in Triton's interpreter, too, and on a machine with a GPU it runs there.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aioengine.kernels import (
    ExpertPlan,
    LoRABatch,
    LoRAPool,
    PlainWeight,
    SlotMemory,
    available_backends,
    get_backend,
)
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.portable import plain as reference
from aioengine.kernels.slots import Column

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else available_backends("cpu")
DEVICES = [("cpu", name) for name in BACKENDS]
if torch.cuda.is_available() and not INTERPRETED:
    DEVICES += [("cuda", name) for name in available_backends("cuda")]
every_backend = pytest.mark.parametrize(("device", "name"), DEVICES)


@every_backend
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sizes=st.sampled_from([(32, 48), (80, 16), (17, 7)]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linears_equal_the_reference(
    device: str,
    name: str,
    tokens: int,
    experts: int,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    biased: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    per_token = min(2, experts)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:per_token] for _ in range(tokens)])
    k, n = sizes
    weight = torch.randn(experts * n, k, generator=generator).to(dtype)
    bias = torch.randn(experts * n, generator=generator).to(dtype) if biased else None
    there_bias = None if bias is None else bias.to(device)
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    plan = ExpertPlan(chosen, experts)
    expected = reference.expert_linear(x[plan.tokens], PlainWeight(weight), bias, plan)
    there = ExpertPlan(chosen.to(device), experts)
    found = get_backend(device, name).expert_linear(
        x[plan.tokens].to(device), PlainWeight(weight.to(device)), there_bias, there
    )
    assert name != "triton" or "groups" not in vars(there), "the host knows no counts"
    if name == "cpu" and PackedWeight.fits(n, k, dtype):
        packed = PackedWeight.pack(weight.clone())
        whole = get_backend(device, name).expert_linear(x[plan.tokens], packed, bias, plan)
        torch.testing.assert_close(whole, found, rtol=1e-2, atol=1e-2 * k**0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance * k**0.5)
    by_token = torch.einsum("ti,tkoi->tko", x.float(), weight.float().view(experts, n, k)[chosen])
    if bias is not None:
        by_token += bias.float().view(experts, n)[chosen]
    weights = torch.rand(tokens, per_token, generator=generator)
    total = there.total(found, weights.to(device)).cpu().float()
    torch.testing.assert_close(
        total, (by_token * weights[..., None]).sum(1), rtol=5e-2, atol=10 * tolerance * k**0.5
    )


@pytest.mark.skipif("cpu" not in available_backends("cpu"), reason="needs the compiled library")
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    form=st.sampled_from([QuantizedWeight, Int4Weight]),
    int8_activations=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sizes=st.sampled_from([(32, 48), (80, 16), (64, 112)]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_quantized_linears_are_those_of_each_expert(
    counts: list[int],
    form: type[QuantizedWeight],
    int8_activations: bool,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    biased: bool,
    seed: int,
) -> None:
    """The same bits as each expert by itself has; with activations as they are, the product of the weight
    that is in effect."""
    generator = torch.Generator().manual_seed(seed)
    (k, n), experts = sizes, len(counts)
    weight = torch.randn(experts * n, k, generator=generator).to(dtype)
    bias = torch.randn(experts * n, generator=generator).to(dtype) if biased else None
    x = torch.randn(sum(counts), k, generator=generator).to(dtype)
    plan = ExpertPlan(torch.repeat_interleave(torch.tensor(counts))[:, None], experts)

    def pack(part: torch.Tensor) -> QuantizedWeight:
        memory = torch.empty(form.packed_bytes(len(part), k), dtype=torch.uint8)
        return form.pack(part.contiguous(), memory, int8_activations=int8_activations)

    packed = pack(weight)
    found = get_backend("cpu", "cpu").expert_linear(x, packed, bias, plan)
    for e, rows in enumerate(x.split(counts)):
        if not len(rows):
            continue
        own = slice(e * n, (e + 1) * n)
        alone = pack(weight[own]).linear(rows, None if bias is None else bias[own])
        assert torch.equal(found[sum(counts[:e]) :][: len(rows)], alone)
    if not int8_activations:
        effective = packed.rows(0, packed.n).float()
        expected = reference.expert_linear(x.float(), PlainWeight(effective), None, plan)
        if bias is not None:
            expected += torch.repeat_interleave(bias.float().view(experts, n), torch.tensor(counts), dim=0)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * k**0.5)


@every_backend
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_adapters_on_experts(device: str, name: str, counts: list[int], seed: int) -> None:
    """Each token's delta is that of its adapter and expert; rows of the base model stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    experts, slots, rank, k, n, other = 5, 3, 4, 32, 16, 2
    numbers = [torch.randn(slots, experts, *shape, generator=generator) for shape in ((rank, k), (n, rank))]
    elements = [number[0, 0].numel() for number in numbers]
    places = other + experts
    memory = torch.zeros(slots * experts * sum(elements), device=device)
    pool_memory = SlotMemory(memory, slots, places, rank, aligned=device != "cpu")
    begin = 0
    for slot in range(slots):
        rows = torch.zeros(places, len(Column), dtype=torch.int64)
        rows[:, Column.AFFINE] = rows[:, Column.SCALE] = -1
        for expert in range(experts):
            for column, matrices in zip((Column.A, Column.B), numbers, strict=True):
                flat = matrices[slot, expert].flatten()
                memory[begin : begin + len(flat)] = flat
                rows[other + expert, column], rows[other + expert, column + 1] = begin, rank
                begin += len(flat)
        own, counted = pool_memory.rows(rows, 0)
        pool_memory.table[slot], pool_memory.device_table[slot] = own, counted
    pool = LoRAPool(pool_memory.by_place(), ("down",), other, k, (n,), (0,), (n,), (0,))
    wanted = [i - 1 for i in range(len(counts))]
    batch = LoRABatch(wanted, counts, [rank] * slots, device)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(sum(counts))])
    plan = ExpertPlan(chosen.to(device), experts)
    x = torch.randn(sum(counts), k, generator=generator)
    y = torch.randn(len(plan.tokens), n, generator=generator)
    expected = y.clone()
    slot_of = [slot for slot, count in zip(wanted, counts, strict=True) for _ in range(count)]
    for row, (token, place) in enumerate(zip(plan.tokens.tolist(), plan.order.tolist(), strict=True)):
        if slot_of[token] >= 0:
            a, b = (matrices[slot_of[token], chosen.flatten()[place]] for matrices in numbers)
            expected[row] += b @ (a @ x[token])
    backend = get_backend(device, name)
    rows_batch = plan.lora(batch, pool.slots.per_slot, 1)
    found = y.to(device)
    h = backend.lora_shrink(x.to(device)[plan.tokens], pool, rows_batch)
    backend.lora_expand(h, pool, found, rows_batch)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
