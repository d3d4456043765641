"""The cardinality of the label ``adapter``: bounded, by use, and without losing a count."""

from __future__ import annotations

from support.metric_script import (
    added,
    admitted,
    by_label,
    ended,
    first_token,
    loaded,
    metrics,
    placed,
    registered,
    samples,
    step,
    unloaded,
    value,
)

from aioengine import events
from aioengine.metrics import EngineMetrics


def prompt_tokens(made: EngineMetrics) -> dict[str, float]:
    return by_label(samples(made), "prompt_tokens_total", "adapter")


def request(made: EngineMetrics, adapter: str) -> None:
    for event in (added(adapter), admitted(adapter), first_token(adapter), ended(adapter)):
        made.handle(event)
    made.handle(step(0, 1, intervals=(events.TokenInterval(adapter, 0.02, 6),)))


def test_the_first_ones_get_a_label() -> None:
    names = [None, "a", "b", "c", "d", "a", "base"]
    made = metrics(*[ended(name) for name in names], labels=2)
    assert prompt_tokens(made) == {"base": 5, "a": 10, "b": 5, "other": 15}


def test_an_adapter_called_base_or_other_passes_for_nothing_else() -> None:
    made = metrics(ended(None), ended("base"), ended("other"))
    assert prompt_tokens(made) == {"base": 5, "base (adapter)": 5, "other (adapter)": 5}


def test_no_adapter_labels_at_all() -> None:
    made = metrics(labels=0)
    request(made, "a")
    assert prompt_tokens(made) == {"other": 5}


def test_the_least_used_adapter_makes_way_for_one_with_more_than_twice_its_requests() -> None:
    made = metrics(labels=2)
    for name in ("often", "often", "seldom"):
        request(made, name)
    request(made, "new")
    request(made, "new")  # twice as many as "seldom": not yet
    assert prompt_tokens(made) == {"often": 10, "seldom": 5, "other": 10}
    request(made, "new")
    assert prompt_tokens(made) == {"often": 10, "new": 5, "other": 15}
    request(made, "seldom")
    assert prompt_tokens(made) == {"often": 10, "new": 5, "other": 20}


def test_sums_never_go_down_and_series_stay_bounded() -> None:
    """Adapters come, are used more and more, and go; after each event every sum is at least as before."""
    made = metrics(labels=3)
    before: dict[str, float] = {}
    count = 0
    for index in range(12):
        name = f"adapter-{index}"
        made.handle(registered(name))
        for _ in range(index + 1):
            request(made, name)
            count += 1
        if index % 3 == 2:
            made.handle(unloaded(f"adapter-{index - 1}"))
        found = samples(made)
        sums: dict[str, float] = {}
        for (full, labels), number in found.items():
            if "adapter" in dict(labels):
                key = f"{full} {dict(labels).get('le')} {dict(labels).get('reason')}"
                sums[key] = sums.get(key, 0) + number
        assert all(sums[key] >= number for key, number in before.items())
        before = sums
        assert len(by_label(found, "prompt_tokens_total", "adapter")) <= 3 + 1
    assert sums["aioengine_request_ttft_seconds_count None None"] == count
    assert sums["aioengine_request_inter_token_seconds_count None None"] == 6 * count
    assert sums["aioengine_request_e2e_seconds_bucket 2.5 None"] == count


def test_series_of_an_unloaded_adapter_disappear_into_other() -> None:
    made = metrics(registered("a"), loaded("a"), placed("a", 0), registered("b"))
    for name in ("a", "a", "b"):
        request(made, name)
    made.handle(unloaded("a"))
    found = samples(made)
    assert not [key for key in found if dict(key[1]).get("adapter") == "a"]
    assert by_label(found, "prompt_tokens_total", "adapter") == {"other": 10, "b": 5}
    assert value(found, "request_e2e_seconds_count", adapter="other") == 2
    assert value(found, "request_e2e_seconds_sum", adapter="other") == 3.0
    assert value(found, "requests_finished_total", adapter="other", reason="stop") == 2
    made.handle(registered("a", version=2))
    request(made, "a")
    assert prompt_tokens(made) == {"other": 10, "b": 5, "a": 5}  # it starts anew


def test_a_replaced_version_takes_nothing_with_it() -> None:
    made = metrics(registered("a"))
    request(made, "a")
    made.handle(registered("a", version=2, replaces=1))
    made.handle(unloaded("a", version=1))
    assert prompt_tokens(made) == {"a": 5}
