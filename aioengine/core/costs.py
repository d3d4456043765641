"""Measured times of steps and moves: the ``view.costs`` of a policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from statistics import fmean
from typing import Literal

from aioengine.core.limits import CoreLimits
from aioengine.core.pacing import ADAPTER_TOKENS, Pacer, StepWork
from aioengine.core.state import AdapterEntry


class MeasuredCosts:
    """The :class:`~aioengine.schedulers.policy.CostsView` of an engine.

    Steps are estimated by the model that sizes prompts' chunks, which learns from every step. An engine that
    sizes none begins to learn when a policy first asks.

    Args:
        adapters: The adapters that the policy knows, by the names that it uses.
        pacer: The engine's, if it has one.
    """

    def __init__(self, adapters: Mapping[str, AdapterEntry], limits: CoreLimits, pacer: Pacer | None) -> None:
        self.learner = pacer
        """Learner of step times; None until a policy asks for them."""
        self._adapters = adapters
        self._limits = limits

    def step(self, tokens: int, ranks: Sequence[int] = (), *, context: int = 0) -> float | None:
        share = tokens / len(ranks) if ranks else 0.0
        work = StepWork(1, tokens, 0.0, tokens * context, round(sum(ranks) * (share + ADAPTER_TOKENS)))
        return self._seconds([work])

    def prefill(self, tokens: int, rank: int = 0, *, cached: int = 0) -> float | None:
        chunk = self._limits.max_num_batched_tokens
        return self._seconds(_chunks(tokens, rank, cached, chunk))

    def load(self, adapter: str, stage: Literal["disk", "slot"]) -> float | None:
        entry = self._adapters.get(adapter)
        if entry is None:
            return None
        took = attrgetter(f"{stage}_seconds")
        known = [each for each in map(took, self._adapters.values()) if each is not None]
        own: float | None = took(entry)
        return own if own is not None or not known else fmean(known)

    def _seconds(self, work: Iterable[StepWork]) -> float | None:
        if self.learner is None:
            self.learner = Pacer(1.0, self._limits.pair_tokens)
        if not self.learner.has_learned:
            return None
        return sum(map(self.learner.seconds, work))


def _chunks(tokens: int, rank: int, cached: int, chunk: int) -> Iterable[StepWork]:
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        pairs = count * (cached + start + count / 2)
        yield StepWork(1, count, pairs, 0, rank * (count + ADAPTER_TOKENS))
