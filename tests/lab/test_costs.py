from __future__ import annotations

import json
import math
import timeit
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_costs import costs_of

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs import CostModel, FitQuality, Stage, StepCosts, StepShape, step_shape
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

coefficient = st.floats(0, 1, allow_nan=False)
step_costs = st.builds(StepCosts, **dict.fromkeys(StepCosts.__struct_fields__, coefficient))
counts = st.integers(0, 10_000)
shapes = st.builds(StepShape, **dict.fromkeys(StepShape._fields, counts))
stages = st.builds(Stage, st.floats(0, 10), st.floats(1, 1e12))
cost_models = st.builds(
    costs_of,
    name=st.text(),
    source=st.text(),
    estimate=st.booleans(),
    sources=st.dictionaries(st.text(), st.text(), max_size=3),
    steps=step_costs,
    step_overhead=coefficient,
    disk=stages,
    slot=stages,
    load_slowdown=st.floats(1, 10),
    device=st.sampled_from(["cpu", "cuda"]),
    device_memory=st.integers(1, 2**40),
    fit=st.none() | st.just(FitQuality(steps=3, median_error=0.01, p90_error=0.1)),
)

SHAPE = StepShape(
    decode_rows=2,
    decode_kv=300,
    prefill_tokens=5,
    prefill_pairs=70,
    sequences=11,
    adapters=13,
    rank_sum=170,
    lora_tokens=19,
    lora_token_ranks=2300,
)


@pytest.mark.parametrize(
    ("field", "times"),
    [
        ("step", 1),
        ("weights", 1),
        ("token", 7),
        ("decode_row", 2),
        ("prefill_token", 5),
        ("sequence", 11),
        ("decode_kv", 300),
        ("prefill_pair", 70),
        ("lora_step", 1),
        ("adapter", 13),
        ("adapter_rank", 170),
        ("lora_token", 19),
        ("lora_token_rank", 2300),
    ],
)
def test_each_coefficient_counts_what_it_says(field: str, times: int) -> None:
    costs = costs_of(steps=StepCosts(**{field: 0.5}))
    assert costs.step_seconds(SHAPE) == 0.5 * times


def test_linears_take_at_least_as_long_as_reading_their_weights() -> None:
    costs = costs_of(steps=StepCosts(weights=1.0, token=0.1))
    taken = [costs.step_seconds(SHAPE._replace(prefill_tokens=tokens)) for tokens in (0, 7, 8, 9, 18)]
    assert taken == pytest.approx([1.0, 1.0, 1.0, 1.1, 2.0])


def test_a_step_without_adapters_has_no_lora_step() -> None:
    assert costs_of(steps=StepCosts(lora_step=1.0)).step_seconds(SHAPE._replace(adapters=0)) == 0


@given(step_costs, shapes, st.sampled_from(StepShape._fields))
def test_more_work_never_takes_less_time(steps: StepCosts, shape: StepShape, field: str) -> None:
    costs = costs_of(steps=steps)
    more = shape._replace(**{field: getattr(shape, field) + 1})
    assert 0 <= costs.step_seconds(shape) <= costs.step_seconds(more)


def test_a_step_is_priced_in_microseconds() -> None:
    costs = costs_of(steps=StepCosts(weights=1.0, token=0.1))
    best = min(timeit.repeat(lambda: costs.step_seconds(SHAPE), number=2000, repeat=5)) / 2000
    assert best < 10e-6, "it is asked once a step of hundreds of thousands"


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
        adapters=2,
        rank_sum=8 + 16,
        lora_tokens=1 + 1 + 10,
        lora_token_ranks=8 + 16 + 160,
    )


def test_shape_of_an_empty_step() -> None:
    assert step_shape(StepBatch(0, [], [])) == StepShape(*[0] * 9)


@given(st.lists(st.integers(2, 50), min_size=1, max_size=8))
def test_chunks_have_the_pairs_of_the_whole_prompt(chunks: list[int]) -> None:
    total, start, pairs = sum(chunks), 0, 0
    for chunk in chunks:
        pairs += step_shape(StepBatch(0, [work(chunk, start, prompt_len=total)], [])).prefill_pairs
        start += chunk
    assert pairs == pytest.approx(total * total / 2, abs=len(chunks))


# Adapters, memory


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_an_adapter_is_as_large_as_the_matrices_in_its_slot(rank: int) -> None:
    costs = costs_of()
    config = EngineConfig(
        model="any", kv_cache_memory="64MiB", lora=LoRAConfig(max_loras=1, max_lora_rank=rank)
    )
    plan = costs.plan(config)
    assert costs.adapter_nbytes(rank) == sum(plan.slot_bytes_by_module.values())
    assert costs.adapter_nbytes(rank, ["q_proj"]) == plan.slot_bytes_by_module["q_proj"]


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="too little"):
        costs_of(device_memory=2**20).plan(EngineConfig(model="any"))


def test_stage() -> None:
    assert Stage(0.5, 100.0).seconds(50) == 1.0


# JSON


@given(cost_models)
def test_json_round_trip(costs: CostModel) -> None:
    assert CostModel.from_json(costs.to_json()) == costs


def test_file_round_trip(tmp_path: Path) -> None:
    costs_of().write(tmp_path / "costs.json")
    assert CostModel.read(tmp_path / "costs.json") == costs_of()
    with pytest.raises(ConfigError, match=r"cannot read cost model .*missing\.json"):
        CostModel.read(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 2, "format 2, but this aioengine reads cost models of format 1; upgrade"),
        (["stepps"], {}, "unknown field 'stepps' .did you mean 'steps'"),
        (["steps", "tokens"], 1.0, "unknown field `tokens`"),
        (["steps", "token"], -1e-9, r"steps\.token=-1e-09: must be finite and at least 0"),
        (["steps", "token"], "fast", "Expected `float`"),
        (["step_overhead"], -1.0, "step_overhead=-1.0"),
        (["load_slowdown"], 0.5, "load_slowdown=0.5: must be finite and at least 1"),
        (["disk", "bandwidth"], 0.0, "bandwidth=0.0: must be finite and more than 0"),
        (["disk", "latency"], -1.0, "latency=-1.0"),
        (["device"], "tpu", "Invalid enum value 'tpu'"),
        (["device_memory"], 0, "device_memory=0"),
        (["model", "num_layers"], 0, r"model\.num_layers=0: must be at least 1"),
        (["model", "layers"], 1, "unknown field `layers`"),
    ],
)
def test_what_is_not_sound_is_refused(path: list[str], value: object, message: str) -> None:
    values = json.loads(costs_of().to_json())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=f"^my file: .*{message}"):
        CostModel.from_json(json.dumps(values).encode(), source="my file")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"{}", b"\xff"])
def test_what_is_no_cost_model_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="my file"):
        CostModel.from_json(data, source="my file")


def test_a_later_format_is_named_before_its_fields_are() -> None:
    data = msgspec.json.encode({"format": 9, "something": "new"})
    with pytest.raises(ConfigError, match="format 9"):
        CostModel.from_json(data)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_coefficients_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match=r"steps\.token"):
        StepCosts(token=value)
