"""The LoRA operations: plain torch against the definition, and every other backend against it.

``test_triton.py`` runs this file in Triton's interpreter, too, and on a machine with a GPU it runs there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.lora_cases import Case, apply, make_case, rounded, turned
from torch import Tensor

from aioengine.kernels import LoRABatch, available_backends, get_backend
from aioengine.kernels.portable import plain as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else available_backends("cpu")
DEVICES = [("cpu", name) for name in BACKENDS]
if torch.cuda.is_available() and not INTERPRETED:
    DEVICES += [("cuda", name) for name in available_backends("cuda")]
every_backend = pytest.mark.parametrize(("device", "name"), DEVICES)
compiled = pytest.mark.skipif("cpu" not in available_backends("cpu"), reason="needs the CPU library")
WIDTHS = [(32, 16, 16), (40, 40), (24,), (7, 50, 3)]
RANKS = [1, 16, 40] if INTERPRETED else [1, 4, 16, 64, 320, 512]
COUNTS = (
    st.sampled_from([0, 1, 2, 15, 16, 17, 33])
    if INTERPRETED
    else st.one_of(st.integers(0, 4), st.integers(0, 70))
)
"""Tokens of a sequence."""


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float32,
    all_widths: Sequence[tuple[int, ...]] = WIDTHS,
) -> Case:
    max_rank = draw(st.sampled_from(RANKS))
    slots = draw(st.integers(1, 6))
    ranks = draw(st.lists(st.integers(1, max_rank), min_size=slots, max_size=slots))
    most = 5 if INTERPRETED else 9
    sequences = draw(st.lists(st.tuples(st.integers(-1, slots - 1), COUNTS), min_size=1, max_size=most))
    widths = draw(st.sampled_from(all_widths))
    slot_affine = draw(st.just([]) | st.lists(st.booleans(), min_size=slots, max_size=slots))
    targeted = draw(st.lists(st.sampled_from(range(len(widths))), min_size=1, unique=True).map(sorted))
    count = len(sequences)
    scale = st.sampled_from([1.0, 0.5, -1.25, 0.0, 0.7])
    return make_case(
        sequences, ranks, max_rank, widths=widths, targeted=targeted, dtype=dtype,
        slot_affine=slot_affine, seed=draw(st.integers(0, 1000)),
        n_in=draw(st.sampled_from([5, 16, 70])) if INTERPRETED else 24,
        scales=draw(st.just([]) | st.lists(scale, min_size=count, max_size=count)),
    )  # fmt: skip


@given(cases())
@pytest.mark.slow
def test_reference_is_the_definition(case: Case) -> None:
    h, y = apply(reference, case)
    max_rank = case.a.shape[1] // len(case.b)
    used = [rank for slot, rank in enumerate(case.ranks) if slot in case.slot_of_token]
    assert h.shape == (len(case.x), len(case.b), -(-max(used, default=0) // 16) * 16)
    expected_h, expected_y = torch.zeros_like(h), case.y.clone()
    for t, slot in enumerate(case.slot_of_token):
        for j, (b_j, offset) in enumerate(zip(case.b, case.offsets, strict=True)):
            if slot >= 0:
                rank = case.ranks[slot]
                a_j = case.a[slot, j * max_rank : j * max_rank + rank]
                expected_h[t, j, :rank] = case.scale_of_token[t] * (a_j @ case.x[t])
                delta = b_j[slot, :, :rank] @ expected_h[t, j, :rank]
                y_j = expected_y[t, offset : offset + b_j.shape[1]]
                y_j += delta
                if case.slot_affine and case.slot_affine[slot]:
                    gain, shift = case.affine[j][slot]
                    y_j += gain * y_j + shift
    torch.testing.assert_close(h, expected_h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-3)


def check(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        scale = other.float().abs().max().clamp(min=1.0) if other.numel() else 1.0
        torch.testing.assert_close(one / scale, other / scale, rtol=tolerance, atol=tolerance)


@every_backend
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]
)
@pytest.mark.parametrize("int8", [False, True])
@given(data=st.data())
@pytest.mark.slow
def test_backends_equal_the_reference(
    device: str, name: str, dtype: torch.dtype, tolerance: float, int8: bool, data: st.DataObject
) -> None:
    case = data.draw(cases(dtype))
    found = apply(get_backend(device, name), case, device, int8=int8)
    check(found, apply(reference, case, int8=int8), tolerance)


@given(cases())
@pytest.mark.slow
def test_int8_matrices_are_whole_numbers_times_scales(case: Case) -> None:
    batch, pool = case.batch, case.int8_pool
    h = reference.lora_shrink(case.x, pool, batch)
    y = case.y.clone()
    reference.lora_expand(h, pool, y, batch)
    expected = case.y.clone()
    max_rank = case.a.shape[1] // len(case.b)
    for t, slot in enumerate(case.slot_of_token):
        for j, (b_j, offset) in enumerate(zip(case.b, case.offsets, strict=True)):
            if slot >= 0:
                rank = case.ranks[slot]
                a, b, scale = rounded(case.a[slot, j * max_rank :][:rank], b_j[slot, :, :rank])
                delta = (b.double() @ torch.diag(scale.double()) @ a.double() @ case.x[t].double()).float()
                expected[t, offset : offset + b_j.shape[1]] += case.scale_of_token[t] * delta
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


MANY = [[(-1, 1), (2, 3000)], [(0, 1), (1, 900), (3, 1100)], [(-1, 2500)], [(s, 40) for s in range(50)]]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [[(-1, 1), (0, 2), (1, 18)]] if INTERPRETED else MANY)
@pytest.mark.slow
def test_large_ranks_and_thousands_of_tokens(
    device: str, name: str, dtype: torch.dtype, sequences: list[tuple[int, int]]
) -> None:
    """The interpreter has the ranks alone."""
    case = make_case(sequences, [320, 16, 100, 1] * 13, 320, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    check(apply(get_backend(device, name), case, device), apply(reference, case), tolerance)


@every_backend
def test_a_pool_in_lower_precision_than_the_activations(device: str, name: str) -> None:
    case = make_case([(-1, 2), (0, 3), (2, 50)], [4, 4, 2], 8, slot_affine=[True, False, True])
    low = case._replace(
        a=case.a.bfloat16(), b=[b.bfloat16() for b in case.b], affine=[w.bfloat16() for w in case.affine]
    )
    wide = low._replace(a=low.a.float(), b=[b.float() for b in low.b], affine=[w.float() for w in low.affine])
    found, expected = apply(get_backend(device, name), low, device), apply(reference, wide)
    torch.testing.assert_close(found[1], expected[1])


@every_backend
def test_tokens_and_columns_without_an_adapter_are_untouched(device: str, name: str) -> None:
    case = make_case([(-1, 3), (1, 4), (3, 20)], [4] * 4, 8, targeted=(0, 2), slot_affine=[True] * 4)
    h, y = apply(get_backend(device, name), case, device)
    assert torch.equal(y[:3], case.y[:3])
    assert torch.equal(y[:, 32:48], case.y[:, 32:48])
    assert not h[:3].any()
    assert (y[3:, :32] != case.y[3:, :32]).all()
    assert (y[3:, 48:] != case.y[3:, 48:]).all()


@every_backend
def test_a_token_that_is_not_finite_stays_alone(device: str, name: str) -> None:
    """A broken sequence shares padded products with others, and must not reach them."""
    case = make_case([(0, 1), (1, 3), (3, 30)], [4, 3, 4, 4], 4, slot_affine=[True, True, False, True])
    backend = get_backend(device, name)
    clean = apply(backend, case, device)[1]
    for token in (0, 2, 9):
        x = case.x.clone()
        x[token] = float("nan")
        _, y = apply(backend, case._replace(x=x), device)
        others = [t for t in range(len(x)) if t != token]
        assert y[token].isnan().all()
        torch.testing.assert_close(y[others], clean[others])


@every_backend
@pytest.mark.parametrize("int8", [False, True])
@given(case=cases(), data=st.data())
@pytest.mark.slow
def test_embedding_is_shrink_of_one_hot_tokens(
    device: str, name: str, int8: bool, case: Case, data: st.DataObject
) -> None:
    vocabulary = case.a.shape[2]
    token_ids = torch.tensor(
        data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=len(case.x), max_size=len(case.x))),
        dtype=torch.long,
    )
    a = case.a[:, : case.a.shape[1] // len(case.b)].contiguous()
    case = case._replace(a=a, b=case.b[:1], affine=case.affine[:1], offsets=case.offsets[:1])
    one_hot = torch.nn.functional.one_hot(token_ids, vocabulary).float()
    pool, there = case.int8_pool if int8 else case.pool, case.on(device)
    expected = reference.lora_shrink(one_hot, pool, case.batch)
    check([reference.lora_embed(token_ids, pool, case.batch)], [expected], 1e-6)
    there_pool = there.int8_pool if int8 else there.pool
    found = get_backend(device, name).lora_embed(token_ids.to(device), there_pool, there.batch)
    check([found.cpu()], [expected], 1e-6)


@every_backend
def test_modules_of_an_adapter_have_ranks_of_their_own(device: str, name: str) -> None:
    """And one that is not targeted, or not scaled, has no place: nothing is read where it would be."""
    case = make_case([(-1, 1), (0, 3), (1, 40), (2, 1)], [16, 5, 8], 16, slot_affine=[True, True, False])
    ranks = {(0, 1): (0, 0), (0, 2): (3, 3), (1, 0): (0, 0), (1, 1): (2, 5), (2, 0): (8, 8)}
    results = []
    for backend, here in ((get_backend(device, name), case.on(device)), (reference, case)):
        pool, y, batch = here.pool, here.y.clone(), here.batch
        for slot in range(len(case.ranks)):
            rows = pool.slots.table[slot].clone()
            for j in range(len(case.b)):
                if (slot, j) in ranks:
                    a_rank, b_rank = ranks[slot, j]
                    where = pool.where(slot, j)._replace(a_rank=a_rank, b_rank=b_rank, affine=-1)
                    rows[j] = torch.tensor(where)
            pool.slots.table[slot], pool.slots.device_table[slot] = pool.slots.rows(rows, 0)
        h = backend.lora_shrink(here.x, pool, batch)
        assert not h[1:4, 1].any() and not h[1:4, 2, 3:].any() and not h[4:44, 0].any()
        backend.lora_expand(h, pool, y, batch)
        backend.lora_affine(y, pool, batch)
        results.append((h.cpu(), y.cpu()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("slots", "ranks", "message"),
    [
        ([1, 0], [4, 4], "sorted by slot"),
        ([0, -1], [4, 4], "sorted by slot"),
        ([2], [4, 4], "slot 2 holds no adapter"),
        ([1], [4, 0], "slot 1 holds no adapter"),
    ],
)
def test_a_batch_that_cannot_be_right_is_refused(slots: list[int], ranks: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRABatch(slots, [1] * len(slots), ranks)


def test_scales_of_one_are_the_usual_batch() -> None:
    """Whatever is said of rows without an adapter."""
    usual = LoRABatch([-1, 0, 2, 2], [3, 1, 2, 1], [4, 0, 8], slot_affine=[True, False, False])
    scales = [0.5, 1.0, 1.0, 1.0]
    found = LoRABatch([-1, 0, 2, 2], [3, 1, 2, 1], [4, 0, 8], slot_affine=[True, False, False], scales=scales)
    assert (found.segments, found.affine, found.width) == (usual.segments, usual.affine, usual.width)
    assert not found.is_weighted and found.num_tokens == usual.num_tokens


def test_the_backend_is_chosen_by_name_then_environment_then_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AIOENGINE_KERNELS", raising=False)
    assert get_backend("cpu").name == available_backends("cpu")[0]
    monkeypatch.setenv("AIOENGINE_KERNELS", "torch")
    assert get_backend("cpu").name == "torch"
    monkeypatch.setenv("AIOENGINE_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"'fast'.*AIOENGINE_KERNELS.*torch"):
        get_backend("cpu")
    with pytest.raises(ValueError, match=r"'none'.*available: .*torch"):
        get_backend("cpu", "none")


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@given(data=st.data())
@pytest.mark.slow
def test_turned_matrices_give_the_same_bits(dtype: torch.dtype, int8: bool, data: st.DataObject) -> None:
    case = data.draw(cases(dtype, [*WIDTHS, (48,), (16, 16, 16, 80)]))
    plain, batch = case.int8_pool if int8 else case.pool, case.batch
    pool, cpu = turned(plain), get_backend("cpu", "cpu")
    for slot in range(len(case.ranks)):
        for j in range(len(plain.widths)):
            same(pool.b(slot, j), plain.b(slot, j))
    h = cpu.lora_shrink(case.x, plain, batch)
    found, expected = case.y.clone(), case.y.clone()
    cpu.lora_expand(h, pool, found, batch)
    cpu.lora_expand(h, plain, expected, batch)
    same(found, expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@pytest.mark.slow
def test_int8_gives_a_token_the_same_bits_alone(dtype: torch.dtype, data: st.DataObject) -> None:
    """However many tokens of its adapter there are, and though some elements are much larger than others."""
    case = data.draw(cases(dtype))
    case.x[:, data.draw(st.integers(0, case.x.shape[1] - 1))] *= data.draw(st.sampled_from([1, 100, 1e4]))
    pool, cpu = turned(case.int8_pool), get_backend("cpu", "cpu")
    h = cpu.lora_shrink(case.x, pool, case.batch)
    together = case.y.clone()
    cpu.lora_expand(h, pool, together, case.batch)
    exact = reference.lora_shrink(case.x, case.int8_pool, case.batch)
    scale = exact.float().abs().max().clamp(min=1.0) if exact.numel() else 1.0
    torch.testing.assert_close(h / scale, exact / scale, rtol=1e-2, atol=1e-2)
    for t in range(len(case.x)):
        y, one = case.y[t : t + 1].clone(), case.alone(t)
        alone = cpu.lora_shrink(case.x[t : t + 1], pool, one)
        cpu.lora_expand(alone, pool, y, one)
        same(y[0], together[t])


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
