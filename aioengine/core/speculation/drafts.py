"""Proposes tokens to the requests that decode, and learns from how many of them were right.

Nothing here changes an answer: a proposed token is computed together with the token before it, and kept only
if it would have been chosen anyway (greedily, or by the draw that seed and position decide). That needs
logits that do not depend on how many tokens a step computes: docs/determinism.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aioengine.core.speculation.depth import MAX_DEPTH, Candidate, allot
from aioengine.core.speculation.drafting import Drafting
from aioengine.core.speculation.prompt_lookup import copy
from aioengine.core.state import Request


class _Found(NamedTuple):
    drafting: Drafting
    draft: list[int]
    candidate: Candidate


class Speculation:
    """Drafts for the requests of one core, from their own texts."""

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], fixed: float, room: int
    ) -> list[list[int]]:
        """Return a draft for each request, often an empty one, with at most as many tokens as ``limits`` say.

        ``fixed`` is a step's fixed time, in units of the time for one token. ``room`` is how many tokens may
        be proposed in all.
        """
        drafts: list[list[int]] = [[] for _ in requests]
        found: list[_Found] = []
        places: list[int] = []
        for index, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            if limit > 0 and (one := self._find(request, min(limit, MAX_DEPTH))) is not None:
                found.append(one)
                places.append(index)
        counts = allot([one.candidate for one in found], len(requests), fixed, room)
        for index, one, count in zip(places, found, counts, strict=True):
            if count == 0:
                one.drafting.acceptance.passed_over(one.drafting.match)
            drafts[index] = one.draft[:count]
        return drafts

    def learn(self, request: Request, proposed: int, right: int) -> None:
        """Learn that the first ``right`` of the ``proposed`` tokens were right."""
        if request.drafting is not None:
            request.drafting.acceptance.learn(request.drafting.match, proposed, right)

    def _find(self, request: Request, limit: int) -> _Found | None:
        drafting = request.drafting
        if drafting is None:
            drafting = request.drafting = Drafting()
        place, drafting.match = drafting.lookup.find(request.tokens)
        if not place:
            return None
        draft = copy(request.tokens, place, limit)
        return _Found(drafting, draft, Candidate(drafting.acceptance.chance(drafting.match), len(draft)))
