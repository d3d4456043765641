"""The text: equal to what prometheus_client writes, and readable by its parsers."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from support.metric_script import (
    added,
    admitted,
    ended,
    first_token,
    info,
    loaded,
    metrics,
    placed,
    registered,
    slot,
    stats,
    step,
)

from aioengine import events
from aioengine.metrics import EngineMetrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0,text/plain;q=0.5"


def busy(**kwargs: object) -> EngineMetrics:
    """Something in every kind of series, and a request id that needs escaping."""
    adapters = [info('we"ird\\name', "slot", pinned=True)]
    made = metrics(
        *(registered("a"), loaded("a"), placed("a", 0), added("a"), admitted("a"), first_token("a")),
        *(ended("a", request_id='a "quoted" \\ id'), ended(None), step(3, 4, slots=(0,))),
        step(0, 2_000_000, intervals=(events.TokenInterval("a", 0.02, 2_000_000),)),
        events.PolicyRefused(time=0.0, reason="place_slot_busy", item="x"),
        snapshot=stats(slot(0, "READY", "a", 1)),
        adapters=adapters,
        **kwargs,  # type: ignore[arg-type]
    )
    made._clock = lambda: 1234.5  # the one number that two scrapes do not share
    return made


def test_both_formats_are_what_prometheus_client_writes() -> None:
    made = busy()
    for _ in range(2):  # the second time from what the first one kept
        assert made.expose("text/plain")[0] == generate_latest(made.registry)
        assert made.expose(OPENMETRICS)[0] == generate_openmetrics(made.registry)


def test_names_with_a_colon_stay_as_they_are_in_both_formats() -> None:
    made = busy(compat="vllm")
    assert made.expose("text/plain")[0] == generate_latest(made.registry)
    assert openmetrics(made)["vllm:num_requests_running"].samples[0].name == "vllm:num_requests_running"


def openmetrics(made: EngineMetrics) -> dict[str, Metric]:
    return {family.name: family for family in parse_openmetrics(made.expose(OPENMETRICS)[0].decode())}


def test_openmetrics_parses_and_has_units() -> None:
    found = openmetrics(busy())
    assert found["aioengine_request_ttft_seconds"].unit == "seconds"
    assert found["aioengine_lora_swap_bytes"].unit == "bytes"
    assert found["aioengine_requests_running"].unit == ""


def test_exemplars_carry_the_request_id_in_the_bucket_of_their_value() -> None:
    made = metrics(first_token("a", "slow", seconds=3.0), first_token("a", "quick", seconds=0.02))
    made.handle(first_token("a", "quicker", seconds=0.018))  # the same bucket: the last one stands
    made.handle(ended("a", request_id="done"))
    found = openmetrics(made)

    def exemplars(name: str) -> dict[str, tuple[str, float]]:
        return {
            sample.labels["le"]: (sample.exemplar.labels["request_id"], sample.exemplar.value)
            for sample in found[name].samples
            if sample.exemplar is not None
        }

    assert exemplars("aioengine_request_ttft_seconds") == {
        "0.025": ("quicker", 0.018),
        "5.0": ("slow", 3.0),
    }
    assert exemplars("aioengine_request_e2e_seconds") == {"2.5": ("done", 1.5)}
    assert b"quicker" not in made.expose()[0]  # the older format has no place for them


def test_a_request_id_too_long_for_an_exemplar_is_left_out() -> None:
    made = metrics(first_token("a", "x" * 200))
    assert b"xxx" not in made.expose(OPENMETRICS)[0]
    assert made.expose(OPENMETRICS)[0] == generate_openmetrics(made.registry)


def test_in_the_registry_of_an_application() -> None:
    registry = CollectorRegistry()
    made = metrics(ended("a"))
    registry.register(made)
    assert (
        registry.get_sample_value("aioengine_prompt_tokens_total", {"engine": "default", "adapter": "a"}) == 5
    )
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(metrics())
