"""Scales in a batch: every backend multiplies what each sequence's adapter adds, whatever else is there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lora_cases import Case, make_case, rounded
from torch import Tensor

from aioengine.kernels import Backend, LoRABatch, LoRAPool, available_backends, get_backend

BACKENDS = list(available_backends("cpu"))
Row = tuple[int, float, int]
"""A sequence: its slot, its scale, and its number of tokens."""


def batch_of(rows: list[Row], ranks: list[int], device: str = "cpu") -> LoRABatch:
    slots, scales, counts = ([row[i] for row in rows] for i in range(3))
    return LoRABatch(slots, counts, ranks, device, scales=scales)  # type: ignore[arg-type]


class Scaled:
    """A pool of adapters, and sequences that scale them."""

    def __init__(self, case: Case, rows: list[Row], seed: int, *, int8: bool = False) -> None:
        self.case, self.rows = case, rows
        self.pool: LoRAPool = case.int8_pool if int8 else case.pool
        generator = torch.Generator().manual_seed(seed)
        tokens, dtype = sum(count for *_, count in rows), case.x.dtype
        self.x = torch.randn(tokens, case.x.shape[1], generator=generator).to(dtype)
        self.y = torch.randn(tokens, case.y.shape[1], generator=generator).to(dtype)
        self.of_token = [(slot, scale) for slot, scale, count in rows for _ in range(count)]
        self.int8 = int8

    def apply(self, backend: Backend, first: int = 0, last: int | None = None) -> Tensor:
        """y of the sequences ``first..last-1``."""
        last = len(self.rows) if last is None else last
        begin, end = (sum(count for *_, count in self.rows[:at]) for at in (first, last))
        batch = batch_of(self.rows[first:last], self.case.ranks)
        x, y = self.x[begin:end].contiguous(), self.y[begin:end].clone()
        backend.lora_expand(backend.lora_shrink(x, self.pool, batch), self.pool, y, batch)
        return y

    @property
    def expected(self) -> Tensor:
        """The definition, in float64."""
        case, y = self.case, self.y.double()
        max_rank = case.a.shape[1] // len(case.b)
        for t, (slot, scale) in enumerate(self.of_token):
            rank = 0 if slot < 0 else case.ranks[slot]
            for j, (b_j, offset) in enumerate(zip(case.b, case.offsets, strict=True)):
                a, b = case.a[slot, j * max_rank :][:rank], b_j[slot, :, :rank]
                delta = b.double() @ (a.double() @ self.x[t].double())
                if self.int8 and rank:
                    whole, b, scales = rounded(a, b)
                    a = scales.double()[:, None] * whole.double()
                    delta = b.double() @ (a @ self.x[t].double())
                y[t, offset : offset + b_j.shape[1]] += scale * delta
        return y


@st.composite
def scaled(draw: st.DrawFn, dtype: torch.dtype = torch.float32, *, int8: bool = False) -> Scaled:
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
    count = st.one_of(st.integers(0, 3), st.integers(0, 40))
    row = st.tuples(st.integers(-1, slots - 1), st.sampled_from([1.0, 0.5, -1.25, 0.0, 0.7]), count)
    rows = draw(st.lists(row, min_size=1, max_size=7))
    return Scaled(case, sorted(rows, key=lambda row: row[0]), seed, int8=int8)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "int8", "tolerance"),
    [(torch.float32, False, 1e-5), (torch.bfloat16, False, 0.05), (torch.bfloat16, True, 0.05)],
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_every_backend_multiplies_them(
    name: str, dtype: torch.dtype, int8: bool, tolerance: float, data: st.DataObject
) -> None:
    case = data.draw(scaled(dtype, int8=int8))
    found, expected = case.apply(get_backend("cpu", name)).double(), case.expected
    scale = expected.abs().max().clamp(min=1.0) if expected.numel() else 1.0
    torch.testing.assert_close(found / scale, expected / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(scaled(dtype))
    backend = get_backend("cpu", "cpu")
    alone = [case.apply(backend, i, i + 1) for i in range(len(case.rows))]
    assert torch.equal(case.apply(backend), torch.cat(alone))


@pytest.mark.parametrize("name", BACKENDS)
def test_embeddings(name: str) -> None:
    case = make_case([(0, 1), (1, 1)], [3, 2], 4, widths=(32,), targeted=(0,), n_in=20)
    tokens = torch.tensor([3, 19, 3, 0])
    batch = batch_of([(-1, 1.0, 1), (0, 1.0, 1), (0, -2.0, 1), (1, 0.5, 1)], case.ranks)
    found = get_backend("cpu", name).lora_embed(tokens, case.pool, batch)
    for t, (slot, scale, rank) in enumerate(((0, 1.0, 3), (0, -2.0, 3), (1, 0.5, 2)), start=1):
        torch.testing.assert_close(found[t, 0, :rank], scale * case.a[slot, :rank, tokens[t]])
    assert not found[0].any()


def test_without_scales_it_is_the_usual_batch() -> None:
    usual = LoRABatch([-1, 0, 2, 2], [3, 1, 2, 1], [4, 0, 8], slot_affine=[True, False, False])
    found = LoRABatch(
        [-1, 0, 2, 2], [3, 1, 2, 1], [4, 0, 8], slot_affine=[True, False, False], scales=[0.5, 1.0, 1.0, 1.0]
    )
    assert (found.segments, found.affine, found.width) == (usual.segments, usual.affine, usual.width)
    assert not found.is_weighted and found.num_tokens == usual.num_tokens
