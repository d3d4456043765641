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
from aioengine.core.speculation.earlier_outputs import EarlierOutputs, follow
from aioengine.core.speculation.prompt_lookup import copy
from aioengine.core.state import Request

_MIN_MATCH = 3
"""Number of tokens that must be the same in an earlier output."""


class _Found(NamedTuple):
    request: Request
    drafting: Drafting
    draft: list[int]
    candidate: Candidate


class Speculation:
    """Drafts for the requests of one core. With ``earlier_outputs``, they come from other requests' outputs,
    too."""

    def __init__(self, *, earlier_outputs: bool) -> None:
        self._outputs = EarlierOutputs() if earlier_outputs else None

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], fixed: float, room: int
    ) -> list[list[int]]:
        """Return a draft for each request, often an empty one, with at most as many tokens as ``limits`` say.

        ``fixed`` is a step's fixed time, in units of the time for one token. ``room`` is how many tokens may
        be proposed in all.
        """
        if self._outputs is not None:
            self._outputs.take_in()
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

    def ended(self, request: Request) -> None:
        """Keep the output of a request that has ended for others of its adapter and tenant."""
        if self._outputs is not None:
            self._outputs.ended(_key(request), request.tokens[request.prompt_len :])

    def _find(self, request: Request, limit: int) -> _Found | None:
        drafting = request.drafting
        if drafting is None:
            drafting = request.drafting = Drafting()
        place, match = drafting.lookup.find(request.tokens)
        draft: list[int] = []
        shares: list[float] = []
        if self._outputs is not None:
            output, common = self._outputs.find(_key(request), drafting.outputs, request.tokens)
            if output is not None and common >= _MIN_MATCH and common > match:
                draft, shares = follow(output, limit)
                match = common
        if not draft and place:
            draft = copy(request.tokens, place, limit)
            shares = [1.0] * len(draft)
        if not draft:
            return None
        drafting.match = match
        chance = drafting.acceptance.chance(match)
        return _Found(request, drafting, draft, Candidate([chance * share for share in shares]))


def _key(request: Request) -> tuple[str | None, str | None, bytes]:
    """Return the key that requests must share to propose tokens to each other: the tenant, the adapter by
    name and content, and the salt."""
    adapter = request.adapter
    return request.options.tenant, None if adapter is None else adapter.label, request.cache_key
