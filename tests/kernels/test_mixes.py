"""Mixes in a batch: every backend adds up each token's weighted adapters, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lora_cases import Case, make_case, rounded
from torch import Tensor

from aioengine.kernels import Backend, LoRABatch, LoRAPool, available_backends, get_backend

BACKENDS = list(available_backends("cpu"))
Parts = Sequence[tuple[int, float]]


class Mixed:
    """A pool of adapters, all of them used, and sequences with mixes of them."""

    def __init__(
        self, case: Case, parts: list[Parts], counts: list[int], seed: int, *, int8: bool = False
    ) -> None:
        self.case, self.parts, self.counts = case, parts, counts
        self.pool: LoRAPool = case.int8_pool if int8 else case.pool
        generator = torch.Generator().manual_seed(seed)
        tokens, dtype = sum(counts), case.x.dtype
        self.x = torch.randn(tokens, case.x.shape[1], generator=generator).to(dtype)
        self.y = torch.randn(tokens, case.y.shape[1], generator=generator).to(dtype)
        self.of_token = [own for own, count in zip(parts, counts, strict=True) for _ in range(count)]
        self.int8 = int8

    def apply(self, backend: Backend, first: int = 0, last: int | None = None) -> Tensor:
        """y of the sequences ``first..last-1``."""
        last = len(self.parts) if last is None else last
        begin, end = sum(self.counts[:first]), sum(self.counts[:last])
        batch = LoRABatch.mixed(self.parts[first:last], self.counts[first:last], self.case.ranks)
        x, y = self.x[begin:end].contiguous(), self.y[begin:end].clone()
        for one in batch.passes:
            backend.lora_expand(backend.lora_shrink(x, self.pool, one), self.pool, y, one)
        return y

    @property
    def expected(self) -> Tensor:
        """The definition, in float64."""
        case, y = self.case, self.y.double()
        max_rank = case.a.shape[1] // len(case.b)
        for t, parts in enumerate(self.of_token):
            for slot, weight in parts:
                rank = case.ranks[slot]
                for j, (b_j, offset) in enumerate(zip(case.b, case.offsets, strict=True)):
                    a, b = case.a[slot, j * max_rank :][:rank], b_j[slot, :, :rank]
                    delta = b.double() @ (a.double() @ self.x[t].double())
                    if self.int8:
                        whole, b, scale = rounded(a, b)
                        a = scale.double()[:, None] * whole.double()
                        delta = b.double() @ (a @ self.x[t].double())
                    y[t, offset : offset + b_j.shape[1]] += weight * delta
        return y


@st.composite
def mixed(draw: st.DrawFn, dtype: torch.dtype = torch.float32, *, int8: bool = False) -> Mixed:
    slots = draw(st.integers(1, 5))
    max_rank = draw(st.sampled_from([4, 16, 64]))
    ranks = draw(st.lists(st.integers(1, max_rank), min_size=slots, max_size=slots))
    seed = draw(st.integers(0, 1000))
    widths = draw(st.sampled_from([(32, 16, 16), (40, 40), (24,)]))
    targeted = draw(st.lists(st.sampled_from(range(len(widths))), min_size=1, unique=True).map(sorted))
    case = make_case(
        [(slot, 1) for slot in range(slots)], ranks, max_rank, widths=widths, targeted=targeted, dtype=dtype,
        seed=seed,
    )  # fmt: skip
    part = st.tuples(st.integers(0, slots - 1), st.sampled_from([1.0, 0.5, -1.25, 0.0, 0.7]))
    parts: list[Parts] = draw(st.lists(st.lists(part, max_size=4), min_size=1, max_size=7))
    count = st.one_of(st.integers(0, 3), st.integers(0, 40))
    counts = draw(st.lists(count, min_size=len(parts), max_size=len(parts)))
    return Mixed(case, parts, counts, seed, int8=int8)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().clamp(min=1.0) if expected.numel() else 1.0
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(case=mixed())
@pytest.mark.slow
def test_every_backend_adds_them_up(name: str, case: Mixed) -> None:
    close(case.apply(get_backend("cpu", name)), case.expected, 1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("int8", [False, True])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_in_bfloat16_and_int8(name: str, int8: bool, data: st.DataObject) -> None:
    case = data.draw(mixed(torch.bfloat16, int8=int8))
    close(case.apply(get_backend("cpu", name)), case.expected, 0.05)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(mixed(dtype))
    backend = get_backend("cpu", "cpu")
    alone = [case.apply(backend, i, i + 1) for i in range(len(case.parts))]
    assert torch.equal(case.apply(backend), torch.cat(alone))


@pytest.mark.parametrize("name", BACKENDS)
def test_embeddings(name: str) -> None:
    case = make_case([(0, 1), (1, 1)], [3, 2], 4, widths=(32,), targeted=(0,), n_in=20)
    tokens = torch.tensor([3, 19, 3, 0])
    parts: list[Parts] = [[(1, 0.5), (0, -2.0)], [], [(0, 1.0)]]
    batch = LoRABatch.mixed(parts, [2, 1, 1], case.ranks)
    found = [get_backend("cpu", name).lora_embed(tokens, case.pool, one) for one in batch.passes]
    a = case.a
    assert len(found) == 2
    torch.testing.assert_close(found[0][:2, 0, :2], 0.5 * a[1, :2][:, tokens[:2]].T)
    torch.testing.assert_close(found[1][:2, 0, :3], -2.0 * a[0, :3][:, tokens[:2]].T)
    torch.testing.assert_close(found[0][3, 0, :3], a[0, :3, 0])
    assert not found[0][2].any() and not found[1][2:].any()


def test_without_mixes_it_is_the_usual_batch() -> None:
    usual = LoRABatch([-1, 0, 2, 2], [3, 1, 2, 1], [4, 0, 8], slot_affine=[True, False, False])
    parts: list[Parts] = [[], [(0, 1.0)], [(2, 1.0)], [(2, 1.0)]]
    found = LoRABatch.mixed(parts, [3, 1, 2, 1], [4, 0, 8], slot_affine=[True, False, False])
    assert (found.segments, found.affine, found.width) == (usual.segments, usual.affine, usual.width)
    assert found.more == () and not found.is_weighted and found.num_tokens == usual.num_tokens


def test_a_slot_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="slot 1 holds no adapter"):
        LoRABatch.mixed([[(0, 0.5), (1, 0.5)]], [1], [4, 0])
