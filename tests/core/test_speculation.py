"""Proposed tokens: where they come from, how many they are, and that they change no output."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from support.full_sim import FullSim

from aioengine import events
from aioengine.core.speculation import Drafting, allot, copy
from aioengine.testing import LIMITS

Text = list[int]


def test_a_text_is_looked_up_in_itself() -> None:
    lookup = Drafting()
    assert lookup.find([1, 2]) == (0, 0)
    assert lookup.find([1, 2, 3]) == (0, 0)
    text = [9, 1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert lookup.find(text) == (4, 3)
    assert copy(text, 4, 3) == [4, 5, 6]
    assert copy(text, 4, 9) == [4, 5, 6, 1, 2, 3, 4, 5, 6], "a copy goes on with itself"
    # One token is changed: it goes on where the copy was, though the last three tokens occur later, too.
    text += [4, 7, 6, 1, 2]
    assert lookup.find(text)[0] == 9
    long = list(range(10_000))
    assert Drafting().find([*long, 5, 6, 7]) == (0, 0), "taken in over several steps"
    lookup = Drafting()
    for _ in range(3):
        found = lookup.find([*long, 5, 6, 7])
    assert found == (8, 3)


def test_more_is_proposed_the_surer_it_is_and_the_fewer_decode() -> None:
    def tokens(chance: float, requests: int, fixed: float = 16.0, room: int = 1000) -> int:
        return sum(allot([chance] * requests, [16] * requests, requests, fixed, room))

    assert tokens(0.95, 1) == 16 and tokens(0.5, 1) in range(2, 6) and tokens(0.02, 1) == 0
    assert tokens(0.5, 1, fixed=100.0) > tokens(0.5, 1)
    assert 0 < tokens(0.9, 16) < 16 * 16
    assert tokens(0.6, 64) == 0, "in a large batch only what is nearly sure"
    assert tokens(0.95, 8, room=10) == 10

    drafting, text = Drafting(), [1, 2, 3, 1, 2, 3]
    assert drafting.draft(text, 4) == [1, 2, 3, 1]
    first = drafting.chance
    for _ in range(20):
        drafting.learn(4, 0)
    assert drafting.chance < 0.06 < first
    for _ in range(1000):
        drafting.passed_over()
    assert drafting.chance > 0.2, "it is tried again"
    drafting.draft(text * 4, 4)
    assert drafting.chance == first, "a long match is another matter"


def run(
    speculation: str, next_token: Callable[[list[int]], int], requests: Sequence[tuple[str | None, Text, int]]
) -> tuple[list[Text], int, list[events.Event]]:
    limits = LIMITS._replace(speculation=speculation, max_model_len=200, num_blocks=80)  # type: ignore[arg-type]
    sim = FullSim(limits, next_token=next_token)
    sim.register("a")
    sim.register("b")
    found = []
    for adapter, prompt, count in requests:
        request = sim.add(adapter, prompt=prompt, max_tokens=count, tenant="t")
        sim.run(steps=1000)
        found.append(request.tokens[request.prompt_len :])
    return found, sim.core.step, sim.events


def periodic(history: list[int]) -> int:
    return 10 + (history[0] * 7 + len(history)) % 11


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    requests = [("a", [3], 60), (None, [4], 1), (None, [4], 2), ("b", [3, 5], 50)]
    expected, steps, _ = run("none", periodic, requests)
    found, fewer, seen = run("ngram", periodic, requests)
    assert found == expected
    assert fewer < 0.6 * steps
    proposals = [e for e in seen if isinstance(e, events.TokensProposed)]
    assert 0 < sum(e.accepted for e in proposals) <= sum(e.proposed for e in proposals)
    assert {e.adapter for e in proposals} == {"a", "b"}


def test_random_text_is_left_alone() -> None:
    """Three tokens occur again, and are followed by something else each time."""

    def noise(history: list[int]) -> int:
        place = len(history) % 4
        return 10 + place if place else random.Random(len(history)).randrange(1000, 90_000)

    requests = [("a", list(range(20, 50)), 120)]
    expected, steps, _ = run("none", noise, requests)
    found, as_many, seen = run("ngram", noise, requests)
    assert (found, as_many) == (expected, steps)
    proposed = sum(e.proposed for e in seen if isinstance(e, events.TokensProposed))
    assert 0 < proposed < 15
