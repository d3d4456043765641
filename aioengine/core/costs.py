"""Measured times of steps and moves: the ``view.costs`` of a policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        chunks: list[StepWork] = []
        for start in range(0, tokens, self._limits.max_num_batched_tokens):
            count = min(self._limits.max_num_batched_tokens, tokens - start)
            pairs = count * (cached + start + count / 2)
            chunks.append(StepWork(1, count, pairs, 0, rank * (count + ADAPTER_TOKENS)))
        return self._seconds(chunks)

    def load(self, adapter: str, stage: Literal["disk", "slot"]) -> float | None:
        def took(entry: AdapterEntry) -> float | None:
            return entry.disk_seconds if stage == "disk" else entry.slot_seconds

        if adapter not in self._adapters:
            return None
        own = took(self._adapters[adapter])
        known = [seconds for seconds in map(took, self._adapters.values()) if seconds is not None]
        return fmean(known) if own is None and known else own

    def _seconds(self, work: Iterable[StepWork]) -> float | None:
        if self.learner is None:
            self.learner = Pacer(1.0, self._limits.pair_tokens)
        return sum(map(self.learner.seconds, work)) if self.learner.has_learned else None
