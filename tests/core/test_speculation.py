"""Proposed tokens: where they come from, how many they are, and that they change no output."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine import events
from aioengine.core.speculation.automaton import SuffixAutomaton
from aioengine.core.speculation.depth import Acceptance, Candidate, allot
from aioengine.core.speculation.earlier_outputs import EarlierOutputs, OutputPlaces, follow
from aioengine.core.speculation.prompt_lookup import PromptLookup, copy
from aioengine.testing import LIMITS, Sim

Text = list[int]
texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=4)


def occurrences(texts: Sequence[Text], piece: Text) -> Counter[int]:
    """How often each token follows ``piece``; -1: the end of a text."""
    size = len(piece)
    return Counter(
        text[at + size] if at + size < len(text) else -1
        for text in texts
        for at in range(len(text) - size + 1)
        if text[at : at + size] == piece
    )


def test_what_too_many_tokens_have_followed_is_not_continued() -> None:
    """Comparing them would take long, in each step and for each request."""
    automaton = SuffixAutomaton()
    automaton.begin_text()
    for i in range(256):
        automaton.add(7)
        automaton.add(1000 + i)
    state, _ = automaton.step(0, 0, 7)
    assert automaton.likely(state)[0] >= 1000
    automaton.add(7)
    automaton.add(999)
    state, _ = automaton.step(0, 0, 7)
    assert automaton.likely(state) == (-1, 0, 0.0)


@given(texts=texts, reader=st.lists(st.integers(0, 3), max_size=20), begun=st.integers(0, 20))
@settings(deadline=None, max_examples=150)
def test_the_automaton_knows_the_longest_common_end_and_what_followed(
    texts: list[Text], reader: Text, begun: int
) -> None:
    """Also for a reader whose place was found before later texts came."""
    automaton = SuffixAutomaton()
    automaton.begin_text()
    for token in texts[0]:
        automaton.add(token)
    state = length = 0
    for token in reader[:begun]:
        state, length = automaton.step(state, length, token)
    known = begun
    for text in texts[1:]:
        automaton.begin_text()
        for token in text:
            automaton.add(token)
        known = min(len(reader), known)
    for at in range(min(begun, len(reader)), len(reader)):
        before = occurrences(texts, reader[at - length : at]) if length else Counter()
        state, length = automaton.step(state, length, reader[at])
        assert length == 0 or occurrences(texts, reader[at + 1 - length : at + 1])
        # No longer piece than the one it went on from could have been found but from the reader's start.
        if begun == 0:
            longer = reader[at - length : at + 1] if length <= at else []
            assert not longer or not occurrences(texts, longer)
        else:
            assert length > 0 or not before[reader[at]]
        if length:
            followed = occurrences(texts, reader[at + 1 - length : at + 1])
            token, _, share = automaton.likely(state)
            del followed[-1]
            assert (token == -1) == (not followed)
            if followed:
                assert followed[token] == max(followed.values())
                assert 0 < share <= 1


def test_a_text_is_looked_up_in_itself() -> None:
    lookup = PromptLookup()
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
    assert PromptLookup().find([*long, 5, 6, 7]) == (0, 0), "taken in over several steps"
    lookup = PromptLookup()
    for _ in range(3):
        found = lookup.find([*long, 5, 6, 7])
    assert found == (8, 3)


def test_outputs_are_not_shared_and_bounded() -> None:
    outputs = EarlierOutputs(max_tokens=100, max_tokens_each=40)

    def after(key: str, text: Text) -> Text:
        place, length = outputs.find(key, OutputPlaces(), text)
        return [] if place is None or length < 3 else follow(place, 4)[0]

    outputs.ended("a", [1, 2, 3, 4, 5, 6])
    outputs.take_in()
    assert after("a", [9, 1, 2, 3]) == [4, 5, 6]
    assert after("b", [9, 1, 2, 3]) == []
    for start in range(10, 40, 6):  # newer ones push it out
        outputs.ended("a", list(range(start, start + 10)))
        outputs.take_in()
        assert outputs.tokens <= 40
    assert after("a", [1, 2, 3]) == []
    assert after("a", [34, 35, 36]) == [37, 38, 39, 40]
    for key in "bcdefg":
        outputs.ended(key, list(range(20)))
        outputs.take_in()
        assert outputs.tokens <= 100 + 20
    assert after("a", [34, 35, 36]) == [] and after("g", [4, 5, 6]) == [7, 8, 9, 10]


def test_more_is_proposed_the_surer_it_is_and_the_fewer_decode() -> None:
    def tokens(chance: float, requests: int, fixed: float = 16.0, room: int = 1000) -> int:
        candidates = [Candidate([chance] * 16)] * requests
        return sum(allot(candidates, requests, fixed, room))

    assert tokens(0.95, 1) == 16 and tokens(0.5, 1) in range(2, 6) and tokens(0.02, 1) == 0
    assert tokens(0.5, 1, fixed=100.0) > tokens(0.5, 1)
    assert 0 < tokens(0.9, 16) < 16 * 16
    assert tokens(0.6, 64) == 0, "in a large batch only what is nearly sure"
    assert tokens(0.95, 8, room=10) == 10

    acceptance = Acceptance()
    first = acceptance.chance(3)
    for _ in range(20):
        acceptance.learn(3, 4, 0)
    assert acceptance.chance(3) < 0.06 < first == acceptance.chance(20)
    for _ in range(1000):
        acceptance.passed_over(3)
    assert acceptance.chance(3) > 0.2, "it is tried again"


def run(
    speculation: str, next_token: Callable[[list[int]], int], requests: Sequence[tuple[str | None, Text, int]]
) -> tuple[list[Text], int, list[events.Event]]:
    limits = LIMITS._replace(speculation=speculation, max_model_len=200, num_blocks=80)  # type: ignore[arg-type]
    sim = Sim(limits, next_token=next_token)
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


@pytest.mark.parametrize("speculation", ["ngram", "suffix"])
def test_a_text_that_repeats_itself_takes_fewer_steps(speculation: str) -> None:
    requests = [("a", [3], 60), (None, [4], 1), (None, [4], 2), ("b", [3, 5], 50)]
    expected, steps, _ = run("none", periodic, requests)
    found, fewer, seen = run(speculation, periodic, requests)
    assert found == expected
    assert fewer < 0.6 * steps
    proposals = [e for e in seen if isinstance(e, events.TokensProposed)]
    assert 0 < sum(e.accepted for e in proposals) <= sum(e.proposed for e in proposals)
    assert {e.adapter for e in proposals} == {"a", "b"}


@pytest.mark.parametrize("speculation", ["none", "ngram"])
def test_forced_tokens_take_no_step_of_their_own(speculation: str) -> None:
    """... and are computed beside the next one, within a step's tokens and beside prompts."""

    def answers(*, constrained: bool) -> tuple[list[Text], int]:
        limits = LIMITS._replace(speculation=speculation, max_model_len=200, num_blocks=80)  # type: ignore[arg-type]
        sim = Sim(limits, next_token=periodic)
        requests = [
            sim.add(prompt=[3 + i] * (1 + 9 * i), max_tokens=20 + i, constrained=constrained and i != 1)
            for i in range(6)
        ]
        while sim.core.requests:
            batch = sim.settle()
            if batch is not None:
                assert sum(len(work.tokens) for work in batch.sequences) <= limits.max_num_batched_tokens
        return [request.tokens[request.prompt_len :] for request in requests], sim.core.step

    (expected, steps), (found, fewer) = answers(constrained=False), answers(constrained=True)
    assert found == expected
    assert fewer < steps


def test_outputs_serve_the_same_adapter_alone() -> None:
    """A text without repetitions, said again."""

    def story(history: list[int]) -> int:
        return 10 + len(history)

    once = [("a", [3], 60), ("b", [3], 60)]
    _, steps, _ = run("suffix", story, once)
    _, without, _ = run("none", story, once)
    assert steps == without, "nothing is known of the other adapter"
    again = [*once, ("a", [5], 60)]
    found, steps_again, _ = run("suffix", story, again)
    assert found == run("none", story, again)[0]
    assert steps_again - steps < 30
    assert run("ngram", story, again)[1] == run("none", story, again)[1]


def test_random_text_is_left_alone() -> None:
    """Three tokens occur again, and are followed by something else each time."""

    def noise(history: list[int]) -> int:
        place = len(history) % 4
        return 10 + place if place else random.Random(len(history)).randrange(1000, 90_000)

    requests = [("a", list(range(20, 50)), 120)]
    expected, steps, _ = run("none", noise, requests)
    found, as_many, seen = run("suffix", noise, requests)
    assert (found, as_many) == (expected, steps)
    proposed = sum(e.proposed for e in seen if isinstance(e, events.TokensProposed))
    assert 0 < proposed < 15
