"""What a layer does beside its linears and adapters: plain torch by definition, other backends by it.

``test_triton.py`` runs this file in Triton's interpreter, too, and on a machine with a GPU it runs there.
"""

from __future__ import annotations

import itertools
import math
import os
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layer_cases import Layer, LayerCase, close, run
from torch.nn import functional as F
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, eager_attention_forward

from aioengine.kernels import (
    AttentionPlan,
    Norm,
    PlainWeight,
    Rotation,
    Scores,
    Span,
    available_backends,
    get_backend,
)
from aioengine.kernels.portable import plain as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else available_backends("cpu")
UNTURNED = Rotation(torch.ones(9, 1, 8), torch.zeros(9, 1, 8))
DTYPES = [torch.float32, torch.bfloat16]
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_local_experts": 1}
DEVICES = [("cpu", name) for name in BACKENDS]
if torch.cuda.is_available() and not INTERPRETED:
    DEVICES += [("cuda", name) for name in available_backends("cuda")]
pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_backend = pytest.mark.parametrize(("device", "name"), DEVICES)


@st.composite
def cases(draw: st.DrawFn, longest: int) -> LayerCase:
    lengths = st.integers(1, 3) | st.integers(1, longest)
    starts = st.just(0) | st.integers(0, longest)
    heads, kv_heads = draw(st.sampled_from([(4, 4), (6, 2), (9, 3), (8, 1)]))
    head_dim = draw(st.sampled_from([16, 32, 80]))
    return LayerCase(
        spans=draw(st.lists(st.tuples(starts, lengths), min_size=1, max_size=5)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=draw(st.sampled_from([4, 16, 32])),
        window=draw(st.none() | st.integers(1, 50)),
        norms=draw(st.booleans()),
        whole_norms=draw(st.booleans()),
        offset=draw(st.sampled_from([None, 0.0, 1.0])),
        rotated=draw(st.sampled_from([None, head_dim // 4, head_dim // 2 - 1])),
        neighbours=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.1])),
        soft_cap=draw(st.sampled_from([None, 3.0])),
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
    )


@every_backend
@given(case=cases(longest=20 if INTERPRETED else 90))
@pytest.mark.slow
def test_attention_equals_the_reference(device: str, name: str, case: LayerCase) -> None:
    """Whatever lies in the cells of others, and beyond a sequence's end: it is all NaN."""
    close(run(get_backend(device, name), case, device), run(reference, case))


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize(
    ("window", "soft_cap", "sinks"), [(None, 3.0, False), (None, None, True), (100, None, False)]
)
def test_long_contexts_beside_short_ones(
    device: str, name: str, window: int | None, soft_cap: float | None, sinks: bool
) -> None:
    spans = (
        [(130, 1), (0, 1), (140, 20), (0, 40)] if INTERPRETED else [(2100, 1), (0, 1), (600, 40), (0, 900)]
    )
    case = LayerCase(spans=spans, heads=2, kv_heads=1, window=window, soft_cap=soft_cap, sinks=sinks)
    close(run(get_backend(device, name), case, device), run(reference, case))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 17), (5, 576)])
def test_norm_and_activation(device: str, name: str, dtype: torch.dtype, rows: int, size: int) -> None:
    backend = get_backend(device, name)
    hidden, delta = torch.randn(2, rows, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    for added, offset, factor in itertools.product((None, delta), (None, 0.0, 1.0), (1.0, 0.25)):
        true, total = hidden.clone(), hidden.clone().to(device)
        expected = reference.add_rms_norm(true, added, Norm(weight, 1e-5, offset), factor)
        there = None if added is None else added.to(device)
        found = backend.add_rms_norm(total, there, Norm(weight.to(device), 1e-5, offset), factor)
        close([total.cpu(), found.cpu()], [true, expected])
        assert INTERPRETED or torch.equal(total.cpu(), true)  # the interpreter cuts bfloat16 off
    gate_up = (8 * torch.randn(rows, 2 * size)).to(dtype)
    gate_up[0, :2] = torch.tensor([-300.0, 300.0]).to(dtype)  # where e^x overflows
    close([backend.silu_and_mul(gate_up.to(device)).cpu()], [reference.silu_and_mul(gate_up)])
    close([backend.gelu_and_mul(gate_up.to(device)).cpu()], [reference.gelu_and_mul(gate_up)])
    numbers = {"alpha": 1.7, "limit": 7.0}
    close(
        [backend.clamped_swiglu(gate_up.to(device), **numbers).cpu()],
        [reference.clamped_swiglu(gate_up, **numbers)],
    )
    true, found = gate_up.clone(), gate_up.clone().to(device)
    backend.soft_cap_(found, 5.0)
    reference.soft_cap_(true, 5.0)
    close([found.cpu()], [true])


@every_backend
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 15, 64, 511, 512, 530, 1536]),
    st.lists(
        st.sets(st.sampled_from([-3.5, -1.0, -0.0, 0.0, 1e-3, 2.0, 3e4, -math.inf]), min_size=1),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([None, None, math.nan, -math.nan, math.inf]),
    st.randoms(use_true_random=False),
)
@pytest.mark.slow
def test_the_first_of_the_largest(
    device: str,
    name: str,
    dtype: torch.dtype,
    size: int,
    kinds: list[set[float]],
    odd: float | None,
    rng: random.Random,
) -> None:
    """Of rows with few different values, of one sign or both, whatever another row holds."""
    values = [[rng.choice(sorted(kind)) for _ in range(size)] for kind in kinds]
    if odd is not None:
        values[rng.randrange(len(kinds))][rng.randrange(size)] = odd
    logits = torch.tensor(values).to(dtype)
    expected = []
    for row in logits.tolist():
        top = math.nan if any(map(math.isnan, row)) else max(row)
        expected.append(row.index(top) if math.isfinite(top) else -1)
    assert get_backend(device, name).argmax(logits.to(device)).tolist() == expected


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(device: str, name: str, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 32), (48, 32), (48,)))
    for b in (None, bias):
        found = get_backend(device, name).linear(
            x.to(device), PlainWeight(weight.to(device)), None if b is None else b.to(device)
        )
        close([found.cpu()], [reference.linear(x, PlainWeight(weight), b)])


@every_backend
def test_norms_of_no_rows(device: str, name: str) -> None:
    """A step in which nobody asks for a token."""
    backend, weight = get_backend(device, name), torch.ones(16, device=device)
    empty = torch.empty(0, 16, device=device)
    assert backend.add_rms_norm(empty, empty.clone(), Norm(weight, 1e-5)).shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_the_definition(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(3, 32).to(dtype), torch.randn(32).to(dtype)
    expected = F.rms_norm(hidden.float(), (32,), weight.float(), 1e-5).to(dtype)
    close([reference.add_rms_norm(hidden.clone(), None, Norm(weight, 1e-5))], [expected])
    gate, up = torch.randn(2, 3, 32).to(dtype)
    both = torch.cat([gate, up], 1)
    close([reference.silu_and_mul(both)], [F.silu(gate.float()).mul(up.float()).to(dtype)])
    gelu = F.gelu(gate.float(), approximate="tanh")
    close([reference.gelu_and_mul(both)], [gelu.mul(up.float()).to(dtype)])
    wide, config = (4 * both).float(), GptOssConfig(swiglu_alpha=1.7, swiglu_limit=2.5, **TINY)
    alternating = torch.stack(wide.chunk(2, 1), dim=-1).flatten(1)
    clamped = GptOssExperts(config)._apply_gate(alternating)
    close([reference.clamped_swiglu((4 * both), alpha=1.7, limit=2.5)], [clamped.to(dtype)])


def test_reference_attention_is_the_definition() -> None:
    """On one sequence without rotation, with torch's own attention."""
    layer = Layer(LayerCase([(0, 9)], heads=4, kv_heads=2, block_size=4))
    plan = AttentionPlan([Span(0, 9, 0)], layer.tables, 4)
    qkv = torch.randn(9, 8, 16)
    q, k, v = (t.transpose(0, 1) for t in qkv.clone().split([4, 2, 2], dim=1))
    reference.rope_store(qkv, None, UNTURNED, layer.cache, plan)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = reference.paged_attention(qkv, layer.cache, plan, Scores())
    close([found], [expected.transpose(0, 1).flatten(1)])


def test_reference_sinks_are_the_definition() -> None:
    """One sequence, with the attention of GPT-OSS in transformers."""
    layer = Layer(LayerCase([(0, 9)], heads=4, kv_heads=2, block_size=4))
    plan = AttentionPlan([Span(0, 9, 0)], layer.tables, 4)
    qkv, sinks = torch.randn(9, 8, 16), torch.randn(4)
    q, k, v = (t.transpose(0, 1)[None] for t in qkv.clone().split([4, 2, 2], dim=1))
    reference.rope_store(qkv, None, UNTURNED, layer.cache, plan)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 2, sinks
    mask = torch.full((9, 9), float("-inf")).triu(1)
    expected, _ = eager_attention_forward(module, q, k, v, mask, scaling=16**-0.5)
    found = reference.paged_attention(qkv, layer.cache, plan, Scores(sinks=sinks))
    close([found], [expected[0].flatten(1)])
