"""Rows, blocks and adapters whose offsets do not fit into 32 bits, in which Triton counts by default.

In Triton's interpreter alone, by way of ``test_triton.py``: on a GPU that memory would have to be there.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Sequence

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.layer_cases import Layer, LayerCase
from support.lora_cases import make_case
from support.triton_here import INTERPRETED, examples
from torch import Tensor

from aioengine.kernels import Backend, ExpertPlan, LayerCache, LoRAPool, get_backend
from aioengine.kernels.backend import Scores
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.portable.quantize import quantize
from aioengine.kernels.weight import PlainWeight

lora = pytest.importorskip("aioengine.kernels.triton.lora")
from aioengine.kernels.triton import blocks  # noqa: E402  (only where there is triton)

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1, as test_triton.py sets it", allow_module_level=True)
EXAMPLES = examples(4, 40)
APART = 2**28 + 64
"""Elements from one row to the next: the ninth is further away than an int32 says."""
FAR = 2**31 + 64
TRITON = get_backend("cpu", "triton")
bounded = settings(max_examples=EXAMPLES, deadline=None, phases=(Phase.explicit, Phase.generate))
"""A kernel that counts in 32 bits reads whatever lies there: to look for a smaller example takes minutes."""


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies all memory of its arguments to where it came from, which is where it is."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros; only what is written to becomes memory."""
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def apart(tensor: Tensor) -> Tensor:
    """The same rows, far from each other."""
    whole = sparse(len(tensor) * APART, tensor.dtype)
    inner = torch.empty(1, *tensor.shape[1:], device="meta").stride()[1:]
    return whole.as_strided(tensor.shape, (APART, *inner)).copy_(tensor)


def behind(pool: LoRAPool) -> LoRAPool:
    """The same adapters, far from the beginning of their memory."""
    near = pool.slots
    slots = copy.copy(near)
    slots.memory = sparse(FAR + len(near.memory), near.memory.dtype)
    slots.memory[FAR:] = near.memory
    slots.table = near.table.clone()
    slots.device_table = slots.table if near.device_table is near.table else near.device_table.clone()
    for slot in range(len(slots.table)):
        rows, counted = slots.rows(slots.table[slot], FAR)
        slots.table[slot], slots.device_table[slot] = rows, counted
    return pool._replace(slots=slots)


@bounded
@given(
    counts=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    int8=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    n_in=st.sampled_from([16, 24, 48]),
)
def test_adapters_and_their_tokens(counts: list[int], int8: bool, dtype: torch.dtype, n_in: int) -> None:
    sequences = [(-1, counts[0]), (0, counts[1]), (2, 8 + counts[2])]
    case = make_case(sequences, [4, 8, 5], 8, n_in=n_in, dtype=dtype, slot_affine=[True, False, True])
    near = case.int8_pool if int8 else case.pool
    ids = torch.arange(len(case.x)) % n_in
    results = []
    for pool, moved in ((near, Tensor.clone), (behind(near), apart)):
        x, y, batch = moved(case.x), moved(case.y), case.batch
        h = lora.lora_shrink(x, pool, batch)
        lora.lora_expand(moved(h), pool, y, batch)
        lora.lora_affine(y, pool, batch)
        results.append((h, y, lora.lora_embed(ids, pool, batch)))
    assert all(map(torch.equal, *results))


class FarQueries:
    """A backend that attends with tokens far from each other."""

    rope_store = staticmethod(TRITON.rope_store)

    @staticmethod
    def paged_attention(qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> Tensor:
        return TRITON.paged_attention(apart(qkv), cache, plan, scores)


@bounded
@given(
    spans=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20)), min_size=2, max_size=3),
    window=st.sampled_from([None, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_blocks_of_keys_and_tokens(
    spans: Sequence[tuple[int, int]], window: int | None, dtype: torch.dtype, seed: int
) -> None:
    case = LayerCase(
        [*spans, (130, 12)], heads=2, kv_heads=1, head_dim=16, window=window, dtype=dtype, seed=seed
    )
    far_queries: Backend = FarQueries  # type: ignore[assignment] # it has no more than a layer needs
    results = []
    for backend in (TRITON, far_queries):
        layer = Layer(case)
        if backend is far_queries:
            shape = layer.cache.keys.shape
            both = apart(torch.full((len(layer.cache.keys), 2, *shape[1:]), torch.nan, dtype=dtype))
            layer.cache = LayerCache(both[:, 0], both[:, 1])
        layer.step(backend, [(0, start) for start, _ in case.spans])
        results.append(layer.step(backend, case.spans))
    assert all(map(torch.equal, *results))


@bounded
@given(
    tokens=st.integers(9, 40),
    format=st.sampled_from(["int4", "int8", "fp8"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_tokens_of_quantized_products(tokens: int, format: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    made = quantize(format, torch.randn(24, 128, generator=generator), 128)
    weight = BlockWeight(format, k=128, dtype=dtype, group=128, **made)
    x = torch.randn(tokens, 128, generator=generator).to(dtype)
    results = []
    for moved in (Tensor.clone, apart):
        y, there = moved(torch.zeros(tokens, weight.n, dtype=dtype)), moved(x)
        blocks.multiply(there, weight, None, y, blocks.config_of(weight, tokens, x))
        results.append(y.clone())
    assert torch.equal(*results) and results[0].any()


def test_the_last_of_many_experts() -> None:
    experts, n_out, n_in = 2**15 + 3, 64, 1024
    weight = sparse(experts * n_out * n_in, torch.bfloat16).view(experts * n_out, n_in)
    generator = torch.Generator().manual_seed(0)
    last = torch.randn(n_out, n_in, generator=generator).to(torch.bfloat16)
    weight[-n_out:] = last
    x = torch.randn(3, n_in, generator=generator).to(torch.bfloat16)
    plan = ExpertPlan(torch.full((3, 1), experts - 1), experts)
    found = TRITON.expert_linear(x, PlainWeight(weight), None, plan)
    one = ExpertPlan(torch.zeros(3, 1, dtype=torch.long), 1)
    assert torch.equal(found, TRITON.expert_linear(x, PlainWeight(last), None, one))
