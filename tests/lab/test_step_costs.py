"""What a step is seen as, and what it costs."""

from __future__ import annotations

import math
from itertools import accumulate

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.errors import ConfigError
from aioengine.lab.costs.steps import Curve, StepCosts, StepShape, StepTimes, curve_at, in_tiles, step_shape
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

coefficient = st.floats(0, 1, allow_nan=False)
shares = st.lists(st.tuples(st.integers(1, 128), st.integers(1, 500)), max_size=5).map(tuple)
counts = st.integers(0, 10_000)
shapes = st.builds(StepShape, *[counts] * 5, shares)
gaps = st.lists(st.tuples(st.integers(1, 500), coefficient), min_size=1, max_size=5)


def rising(steps: list[tuple[int, float]]) -> Curve:
    xs, ys = (accumulate(column) for column in zip(*steps, strict=True))
    return tuple((float(x), y) for x, y in zip(xs, ys, strict=True))


def any_way(steps: list[tuple[int, float]]) -> Curve:
    """Curves by rank may fall."""
    xs = accumulate(x for x, _ in steps)
    return tuple((float(x), y) for x, (_, y) in zip(xs, steps, strict=True))


numbers = ("step", "sequence", "decode_kv", "prefill_pair", "lora_step")
step_costs = st.builds(
    StepCosts,
    linears=gaps.map(rising),
    tile=st.integers(1, 300),
    adapter=gaps.map(any_way),
    lora_token=gaps.map(any_way),
    **dict.fromkeys(numbers, coefficient),
)

SHAPE = StepShape(
    decode_rows=2,
    decode_kv=300,
    prefill_tokens=5,
    prefill_pairs=70,
    sequences=11,
    adapters=((8, 1), (16, 3), (16, 2)),
)


@pytest.mark.parametrize(
    ("field", "value", "seconds"),
    [
        ("step", 0.5, 0.5),
        ("linears", ((0.0, 0.0), (1.0, 0.5)), 0.5 * 7),
        ("sequence", 0.5, 0.5 * 11),
        ("decode_kv", 0.5, 0.5 * 300),
        ("prefill_pair", 0.5, 0.5 * 70),
        ("lora_step", 0.5, 0.5),
        ("adapter", ((8.0, 0.5), (16.0, 3.0)), 0.5 + 2 * 3.0),
        ("lora_token", ((8.0, 0.5), (16.0, 3.0)), 0.5 + 5 * 3.0),
    ],
)
def test_each_coefficient_counts_what_it_says(field: str, value: object, seconds: float) -> None:
    step_seconds = StepTimes(StepCosts(**{field: value}))  # type: ignore[arg-type]
    assert step_seconds(SHAPE) == step_seconds(SHAPE) == pytest.approx(seconds)


@given(step_costs, shapes)
def test_kernels_that_pad_cost_what_the_largest_rank_of_the_step_does(
    steps: StepCosts, shape: StepShape
) -> None:
    largest = max((rank for rank, _ in shape.adapters), default=0)
    same = shape._replace(adapters=tuple((largest, tokens) for _, tokens in shape.adapters))
    padded = msgspec.structs.replace(steps, padded=True)
    assert StepTimes(padded)(shape) == StepTimes(steps)(same)


def test_a_curve_is_level_then_straight() -> None:
    curve = ((2.0, 1.0), (4.0, 3.0), (8.0, 5.0))
    assert [curve_at(curve, x) for x in (0, 2, 3, 4, 6, 8, 12)] == [1, 1, 2, 3, 4, 5, 7]
    assert [curve_at(((2.0, 1.0),), x) for x in (0, 2, 9)] == [1, 1, 1]
    assert [curve_at(((2.0, 3.0), (4.0, 1.0)), x) for x in (3, 4, 9)] == [2, 1, 1], "it never gets to less"


def test_beyond_the_first_tile_whole_ones_are_paid_for() -> None:
    assert [in_tiles(n, 64) for n in (0, 1, 63, 64, 65, 128, 129)] == [0, 1, 63, 64, 128, 128, 192]
    assert [in_tiles(n, 1) for n in (0, 1, 2, 65)] == [0, 1, 2, 65]
    step_seconds = StepTimes(StepCosts(linears=((0.0, 0.0), (1.0, 1.0)), tile=4))
    assert [step_seconds(StepShape(0, 0, n, 0, 1)) for n in (3, 4, 5, 8)] == [3, 4, 8, 8]


@given(step_costs, shapes, st.sampled_from(StepShape._fields[:5]))
def test_more_work_never_takes_less_time(steps: StepCosts, shape: StepShape, field: str) -> None:
    step_seconds = StepTimes(steps)
    more = step_seconds(shape._replace(**{field: getattr(shape, field) + 1}))
    assert 0 <= step_seconds(shape) <= more or more == pytest.approx(step_seconds(shape))


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", math.nan, r"step=nan: must be a finite number"),
        ("sequence", math.inf, r"sequence=inf: must be a finite number"),
        ("decode_kv", -1.0, r"decode_kv=-1\.0: must be >= 0"),
        ("tile", 0, r"tile=0: must be >= 1"),
        ("linears", (), r"steps\.linears=\[\]: must have a point"),
        ("linears", ((1.0, 2.0), (2.0, 1.0)), r"steps\.linears: falls"),
        ("adapter", ((8.0, 1.0), (8.0, 2.0)), r"steps\.adapter: its points must be in order"),
        ("adapter", ((8.0, -1.0),), r"adapter\[0\]\[1\]=-1\.0: must be >= 0"),
        ("lora_token", ((-1.0, 1.0),), r"lora_token\[0\]\[0\]=-1\.0: must be"),
    ],
)
def test_coefficients_are_checked(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepCosts(**{field: value})  # type: ignore[arg-type]


# The shape of a step


def work(tokens: int, start: int, slot: int = -1, prompt_len: int = 10) -> SequenceWork:
    return SequenceWork("r", slot, [0] * tokens, start, [], True, SamplingParams(), 0, [], prompt_len)


def test_shape_of_a_mixed_step() -> None:
    batch = StepBatch(
        step=7,
        sequences=[
            work(1, 10),  # its first token after the prompt: reads 11 positions
            work(6, 4),  # the rest of a prompt
            work(1, 99, slot=0),
            work(1, 9, slot=2),  # the last token of a prompt is no decode
            work(10, 0, slot=2),
        ],
        slot_ranks=[8, 64, 16],
    )
    assert step_shape(batch) == StepShape(
        decode_rows=2,
        decode_kv=11 + 100,
        prefill_tokens=6 + 1 + 10,
        prefill_pairs=6 * 4 + 18 + 9 + 50,  # and a half, which is dropped
        sequences=5,
        adapters=((8, 1), (16, 11)),
    )


@given(st.lists(st.integers(2, 50), min_size=1, max_size=8))
def test_chunks_have_the_pairs_of_the_whole_prompt(chunks: list[int]) -> None:
    total, start, pairs = sum(chunks), 0, 0
    for chunk in chunks:
        pairs += step_shape(StepBatch(0, [work(chunk, start, prompt_len=total)], [])).prefill_pairs
        start += chunk
    assert pairs == pytest.approx(total * total / 2, abs=len(chunks))


@given(step_costs, shapes, st.integers(1, 40))
def test_repeated_steps_are_priced_to_the_last_bit_as_they_are_one_by_one(
    steps: StepCosts, shape: StepShape, count: int
) -> None:
    times = StepTimes(steps)
    kvs = [shape.decode_kv + step * shape.decode_rows for step in range(count)]
    ahead = [seconds for _, seconds in zip(range(count), times.repeated(shape), strict=False)]
    assert ahead == [times(shape._replace(decode_kv=kv)) for kv in kvs]
