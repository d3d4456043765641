"""Bounds the time of a step by limiting how many prompt tokens go into it.

All requests in a step get their next token when the whole step is done, and new requests wait for its end
too, so a long prompt computed in one piece delays all of them. Prompts are therefore cut into chunks that
take about ``max_step_seconds``, judged by the times of earlier steps. The chunks become smaller as the
context before them grows, as more sequences decode in the same step, and as the machine becomes slower.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry, Request
from aioengine.step import SequenceWork

GRAIN = 16
"""Chunks are multiples of this, and never smaller: kernels compute tokens in tiles of 8 or 16."""
LEAST_SHARE = 1 / 3
"""Chunks may always take this share of the time of the decodes beside them, however long those take."""
LEAST_SHARE_ALONE = 1.0
"""The same without decodes: as much time as the step's fixed cost takes."""
ADAPTER_TOKENS = 8
"""Tokens added per adapter in a step: an adapter costs its rank times (its tokens + this)."""
_FIRST_TOKENS = 64
"""Tokens in the first step at most; each later step may double the largest so far."""
_FIRST_DECODE_PAIRS = 3.0
"""First estimate of how many prefill pairs cost as much as one decode pair, whose keys are read for a single
query."""
_FIRST_RANK = 0.004
"""First estimate of what one rank of an adapter adds to a token's cost."""
_RISE, _FALL = 0.5, 0.35
"""Share of an upward and of a downward deviation that is learned at once. Upward is larger, because too small
a chunk is the safer error."""
_SUDDEN = 1.5
"""A step that takes more than this many times its expected time is taken for a slower machine:
``_SUDDEN_RISE`` of the deviation is learned. If the next step fits better to what was known before, it was an
accident, and is forgotten."""
_SUDDEN_RISE = 0.85
_BELIEVED = 4.0
"""A step that takes more than this many times its expected time counts as one that takes this many. (The
machine may have been suspended.)"""
_COMMON = 0.5
"""Share of a deviation that is attributed to the machine as a whole."""


class StepWork(NamedTuple):
    """The quantities that determine a step's time."""

    steps: int = 1
    tokens: int = 0
    """Tokens computed; those whose log-probabilities are asked for count twice."""
    pairs: float = 0.0
    """Query-key pairs in chunks of prompts."""
    decode_pairs: int = 0
    """Query-key pairs of decodes."""
    ranks: int = 0
    """Sum over the adapters of rank times (tokens plus 8)."""

    @classmethod
    def of(cls, sequences: Iterable[SequenceWork], slot_ranks: Sequence[int]) -> StepWork:
        tokens = decode_pairs = ranks = 0
        pairs = 0.0
        slots: set[int] = set()
        for work in sequences:
            count, start, slot = len(work.tokens), work.start, work.slot
            tokens += count + work.score
            if count == 1:
                decode_pairs += start
            else:
                pairs += count * (start + count / 2)
            if slot >= 0:
                slots.add(slot)
                ranks += slot_ranks[slot] * count
        ranks += sum(slot_ranks[slot] for slot in slots) * ADAPTER_TOKENS
        return cls(1, tokens, pairs, decode_pairs, ranks)


class Pacer:
    """Sizes chunks by a model of a step's seconds that it learns from the steps.

    The seconds are a sum of terms: each entry of :class:`StepWork` times a coefficient. When a step is
    measured, each coefficient is multiplied by a power of measured / predicted. The larger its term is, the
    larger is the exponent. This is the multiplicative update of Kivinen and Warmuth, "Exponentiated Gradient
    versus Gradient Descent for Linear Predictors" (1997). So coefficients stay positive, and no single
    measurement changes them much. There is no clock here, and equal measurements give equal chunks.

    Args:
        max_step_seconds: Target time of a step.
        pair_tokens: First estimate of the cost of a query-key pair, in tokens.
    """

    def __init__(self, max_step_seconds: float, pair_tokens: float) -> None:
        self.max_step_seconds = max_step_seconds
        self._largest = _FIRST_TOKENS // 2
        """Tokens of the largest step so far."""
        self.steps = 0
        """Steps that have been measured."""
        self._before: list[float] | None = None
        """The coefficients before the last step, if that took suddenly long."""
        in_tokens = (GRAIN, 1.0, pair_tokens, _FIRST_DECODE_PAIRS * pair_tokens, _FIRST_RANK)
        self._coefficients = [max_step_seconds / _FIRST_TOKENS * tokens for tokens in in_tokens]

    def seconds(self, work: StepWork) -> float:
        """Predict a step's seconds."""
        return _sum(self._coefficients, work)

    def learn(self, work: StepWork, seconds: float) -> None:
        """Learn from a step's time."""
        if not 0 < seconds < math.inf:
            return
        before, self._before = self._before, None
        if before is not None:
            now, then = seconds / self.seconds(work), seconds / _sum(before, work)
            if abs(math.log(then)) < abs(math.log(now)):  # the last step was an accident
                self._coefficients = before
        terms = list(map(float.__mul__, self._coefficients, map(float, work)))
        expected = sum(terms)
        deviation, common = math.log(seconds / expected), _COMMON
        self.steps += 1
        if self.steps == 1:
            rate = common = 1.0
        else:
            bound = math.log(_BELIEVED)
            deviation = min(max(deviation, -bound), bound)
            rate = max(_RISE if deviation > 0 else _FALL, 1 / self.steps)
            if deviation > math.log(_SUDDEN):
                self._before, rate = self._coefficients, max(rate, _SUDDEN_RISE)
        own = (1 - common) * expected / sum(map(float.__mul__, terms, terms))
        learned, exp = rate * deviation, math.exp
        self._coefficients = [
            coefficient * exp(learned * (common + own * term))
            for coefficient, term in zip(self._coefficients, terms, strict=True)
        ]
        self._largest = max(self._largest, work.tokens)

    def fixed_tokens(self, decodes: StepWork) -> float:
        """Return the fixed cost of a step with these decodes, in units of the time for one more token."""
        each = self._coefficients[1]
        if decodes.decode_pairs:
            each += self._coefficients[2] * decodes.decode_pairs / decodes.tokens
        return max(self.seconds(decodes) / each - decodes.tokens, 0.0)

    def drafts(self, decodes: StepWork) -> int:
        """Return how many tokens may be proposed in a step with these decodes, so that prompts have their
        least share of the target; at least a smallest chunk."""
        left = self.max_step_seconds / (1 + LEAST_SHARE) - self.seconds(decodes)
        _, token, pair, _, rank = self._coefficients
        each = token + (pair * decodes.decode_pairs + rank * decodes.ranks) / max(decodes.tokens, 1)
        return max(int(left / each), GRAIN)

    def allowance(self, decodes: StepWork, tokens: int) -> Allowance:
        """Return the allowance for prompts in a step with these decodes and room for this many more
        tokens."""
        taken = self.seconds(decodes)
        least = taken * (LEAST_SHARE if decodes.tokens else LEAST_SHARE_ALONE)
        return self._allowance(decodes, tokens, max(self.max_step_seconds - taken, least))

    def allowance_of_decodes(self, decodes: StepWork, tokens: int) -> Allowance:
        """Return the allowance for this many more tokens that count as decodes. They leave prompts the least
        share of the target."""
        seconds = self.max_step_seconds / (1 + LEAST_SHARE) - self.seconds(decodes)
        return self._allowance(decodes, tokens, max(seconds, 0.0))

    def _allowance(self, decodes: StepWork, tokens: int, seconds: float) -> Allowance:
        grown = max(2 * self._largest - decodes.tokens, 2 * GRAIN)
        return Allowance(min(tokens, grown), seconds, self._coefficients)


def _sum(coefficients: Sequence[float], work: StepWork) -> float:
    return sum(map(float.__mul__, coefficients, map(float, work)))


class Floor:
    """The tokens that requests of one kind get in a step, however little time is left: a smallest chunk for
    the first of them, or for as many short ones as need no more together."""

    def __init__(self) -> None:
        self._left = GRAIN

    def of(self, tokens: int) -> int:
        """Return how many of a request's ``tokens`` are sure to be computed."""
        least = min(tokens, GRAIN)
        return least if least <= self._left else 0

    def take(self, tokens: int) -> None:
        self._left -= tokens


class Allowance:
    """Tokens and seconds that chunks of prompts may take in one step, of which the time need not be
    bounded."""

    def __init__(self, tokens: int, seconds: float = math.inf, coefficients: Sequence[float] = (0.0,) * 5):
        self._tokens = tokens
        self._seconds = seconds
        self._coefficients = coefficients
        self._held = (0, 0.0)

    def has_room(self, request: Request, floor: Floor) -> bool:
        """Whether a request that is to start would get a chunk, or all that the prefix cache has not."""
        if self._tokens <= 0:
            return False
        if self._seconds == math.inf or floor.of(GRAIN):
            return True
        start = len(request.find_cached()) * request.cache.block_size
        tokens = min(request.remaining - start, GRAIN)
        each, half = self._costs(request, start)
        return floor.of(tokens) > 0 or tokens * (each + half * tokens) <= self._seconds

    def take(self, request: Request, tokens: int, floor: Floor | None = None) -> int:
        """Return how many of these ``tokens`` of a request to compute. With a ``floor`` they are whole
        grains, and at least those of the floor, however little time is left, if the step has room."""
        count, (each, half) = min(tokens, self._tokens), self._costs(request, request.computed)
        fitting = _fitting(each, half, self._seconds)
        if fitting < count:
            count = fitting if floor is None else min(count, max(fitting // GRAIN * GRAIN, floor.of(count)))
        self._tokens -= count
        self._seconds -= count * (each + half * count)
        if floor is not None:
            floor.take(count)
        return count

    def hold(self, request: Request) -> None:
        """Reserve half of the allowance for this request, or less if it needs less."""
        tokens = min(request.remaining, (self._tokens + 1) // 2)
        each, half = self._costs(request, request.computed)
        seconds = min(request.remaining * (each + half * request.remaining), self._seconds / 2)
        self._held = tokens, seconds
        self._tokens -= tokens
        self._seconds -= seconds

    def give_back(self) -> None:
        """Return the reserved part to the rest."""
        self._tokens += self._held[0]
        self._seconds += self._held[1]

    def _costs(self, request: Request, start: int) -> tuple[float, float]:
        """Return (a, b): n tokens after the first ``start`` take n * (a + b * n) seconds."""
        _, token, pair, _, rank = self._coefficients
        twice = 2 if request.unscored else 1
        ranks = 0 if request.adapter is None else request.adapter.rank
        return token * twice + pair * start + rank * ranks, pair / 2


def _fitting(each: float, half: float, seconds: float) -> int:
    """Return the largest n of which n * (each + half * n) is at most ``seconds``."""
    if not 0 < seconds < math.inf:
        return sys.maxsize if seconds > 0 else 0
    return int(2 * seconds / (each + math.sqrt(each * each + 4 * half * seconds)))


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
        return sum(map(self.learner.seconds, work)) if self.learner.steps else None
