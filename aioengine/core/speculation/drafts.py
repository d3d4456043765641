"""Proposes tokens to the requests that decode, and learns from how many of them were right.

Nothing here changes an answer: a proposed token is computed together with the token before it, and kept only
if it would have been chosen anyway (greedily, or by the draw that seed and position decide). That needs
logits that do not depend on how many tokens a step computes: docs/determinism.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from aioengine.core.speculation.depth import MAX_DEPTH, Candidate, Drafting, allot
from aioengine.core.speculation.prompt_lookup import copy
from aioengine.core.state import Request


def propose(requests: Sequence[Request], limits: Sequence[int], fixed: float, room: int) -> list[list[int]]:
    """Return a draft for each request from its own text, often an empty one, with at most as many tokens as
    ``limits`` say.

    ``fixed`` is a step's fixed time, in units of the time for one token. ``room`` is how many tokens may be
    proposed in all.
    """
    drafts: list[list[int]] = [[] for _ in requests]
    places: list[int] = []
    candidates: list[Candidate] = []
    for index, (request, limit) in enumerate(zip(requests, limits, strict=True)):
        if limit <= 0:
            continue
        drafting = request.drafting = request.drafting or Drafting()
        place, drafting.match = drafting.lookup.find(request.tokens)
        if place:
            drafts[index] = copy(request.tokens, place, min(limit, MAX_DEPTH))
            places.append(index)
            candidates.append(Candidate(drafting.acceptance.chance(drafting.match), len(drafts[index])))
    counts = allot(candidates, len(requests), fixed, room)
    for index, count in zip(places, counts, strict=True):
        proposed = requests[index].drafting
        if count == 0 and proposed is not None:
            proposed.acceptance.passed_over(proposed.match)
        del drafts[index][count:]
    return drafts


def learn(request: Request, proposed: int, right: int) -> None:
    """Learn that the first ``right`` of the ``proposed`` tokens were right."""
    if request.drafting is not None:
        request.drafting.acceptance.learn(request.drafting.match, proposed, right)
