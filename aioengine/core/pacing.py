"""Bounds the time of a step by limiting how many prompt tokens go into it (and, where tenants differ in how
much they ask for, how many decodes: :mod:`aioengine.core.turns`).

All requests in a step get their next token when the whole step is done, and new requests wait for its end
too, so a long prompt computed in one piece delays all of them. Prompts are therefore cut into chunks that
take about ``max_step_seconds``, judged by the times of earlier steps. The chunks become smaller as the
context before them grows, as more sequences decode in the same step, and as the machine becomes slower.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from aioengine.core.state import Request
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
_RISE, _FALL, _FALL_AGAIN = 0.5, 0.2, 0.4
"""Share of an upward and of a downward deviation that is learned at once, and of a downward one that follows
another. Upward is larger, because too small a chunk is the safer error; but one that was too small again was
no accident."""
_FELL = -0.1
"""A downward deviation that counts as one, as a logarithm: a tenth of the time, or one and a half of the
deviations' mean, if that is more."""
_SPREAD_STEPS = 32
"""Steps over which that mean is taken, roughly."""
_SUDDEN = 1.5
"""A step that takes more than this many times its expected time is taken for a slower machine:
``_SUDDEN_RISE`` of the deviation is learned. If the next step fits better to what was known before, it was an
accident, and is forgotten."""
_SUDDEN_RISE = 0.85
_EXCESS = 2.5
"""How many times its expected time a step may take without consequence. If steps take longer again and again,
the target is shortened, so that the next such step takes ``_EXCESS`` targets: only the second-longest of
``_REMEMBERED`` steps counts."""
_SHORTEST = 4.0
"""The target is shortened by this factor at most."""
_REMEMBERED = 64
_SETTLED = 16
"""Steps that are guesses, and count for nothing in that."""
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
        self._steps = 0
        self._fell = False
        """Whether the last step took less time than expected."""
        self._spread = 0.0
        """Mean size of the deviations, as logarithms."""
        self._before: list[float] | None = None
        """The coefficients before the last step, if that took suddenly long."""
        self._excesses: list[tuple[int, float]] = []
        """Number and excess of the steps remembered that took longer than the target and ``_EXCESS`` times
        what was expected."""
        in_tokens = (GRAIN, 1.0, pair_tokens, _FIRST_DECODE_PAIRS * pair_tokens, _FIRST_RANK)
        first = max_step_seconds / _FIRST_TOKENS
        self._coefficients = [first * tokens for tokens in in_tokens]

    @property
    def has_learned(self) -> bool:
        """Whether a step has been measured."""
        return self._steps > 0

    def seconds(self, work: StepWork) -> float:
        """Predict a step's seconds."""
        return _sum(self._coefficients, work)

    def learn(self, work: StepWork, seconds: float) -> None:
        """Learn from a step's time."""
        if not 0 < seconds < math.inf:
            return
        self._forget_accident(work, seconds)
        # Term by term, without lists and loops: each step waits for this.
        c0, c1, c2, c3, c4 = self._coefficients
        t0, t1, t2, t3, t4 = c0 * work[0], c1 * work[1], c2 * work[2], c3 * work[3], c4 * work[4]
        expected = t0 + t1 + t2 + t3 + t4
        deviation = math.log(seconds / expected)
        if self._steps > 0:
            bound = math.log(_BELIEVED)
            deviation = min(max(deviation, -bound), bound)
        self._steps += 1
        self._note_excess(seconds, expected)
        fell_before, self._fell = self._fell, deviation < min(_FELL, -1.5 * self._spread)
        self._spread += (abs(deviation) - self._spread) / _SPREAD_STEPS
        fall = _FALL_AGAIN if fell_before and self._fell else _FALL
        rate = max(_RISE if deviation > 0 else fall, 1 / self._steps)
        if self._steps > 1 and deviation > math.log(_SUDDEN):
            self._before, rate = self._coefficients, max(rate, _SUDDEN_RISE)
        common = 1.0 if self._steps == 1 else _COMMON
        own = (1 - common) * expected / (t0 * t0 + t1 * t1 + t2 * t2 + t3 * t3 + t4 * t4)
        learned, exp = rate * deviation, math.exp
        self._coefficients = [
            c0 * exp(learned * (common + own * t0)),
            c1 * exp(learned * (common + own * t1)),
            c2 * exp(learned * (common + own * t2)),
            c3 * exp(learned * (common + own * t3)),
            c4 * exp(learned * (common + own * t4)),
        ]
        self._largest = max(self._largest, work.tokens)

    def _forget_accident(self, work: StepWork, seconds: float) -> None:
        """Forget what was learned from the last step, if it took suddenly long and this one does not."""
        before, self._before = self._before, None
        if before is not None:
            now = abs(math.log(seconds / self.seconds(work)))
            if abs(math.log(seconds / _sum(before, work))) < now:
                self._coefficients = before

    def _note_excess(self, seconds: float, expected: float) -> None:
        """Note a step that took much longer than expected, and longer than the target."""
        if self._excesses and self._excesses[0][0] <= self._steps - _REMEMBERED:
            del self._excesses[0]
        times = seconds / expected / _EXCESS
        if times > 1 and seconds > self.max_step_seconds and self._steps > _SETTLED:
            self._excesses.append((self._steps, min(times, _SHORTEST)))

    @property
    def _target(self) -> float:
        """The target, shortened where steps have taken much longer than expected."""
        if len(self._excesses) < 2:
            return self.max_step_seconds
        return self.max_step_seconds / sorted(times for _, times in self._excesses)[-2]

    def fixed_tokens(self, decodes: StepWork) -> float:
        """Return the fixed cost of a step with these decodes, in units of the time for one more token."""
        each = self._coefficients[1]
        if decodes.decode_pairs:
            each += self._coefficients[2] * decodes.decode_pairs / decodes.tokens
        return max(self.seconds(decodes) / each - decodes.tokens, 0.0)

    def drafts(self, decodes: StepWork) -> int:
        """Return how many tokens may be proposed in a step with these decodes, so that prompts have their
        least share of the target; at least a smallest chunk."""
        left = self._target / (1 + LEAST_SHARE) - self.seconds(decodes)
        _, token, pair, _, rank = self._coefficients
        each = token + (pair * decodes.decode_pairs + rank * decodes.ranks) / max(decodes.tokens, 1)
        return max(int(left / each), GRAIN)

    @property
    def decode_room(self) -> float:
        """The seconds that decodes may take beside the fixed cost of their step, so that prompts have their
        least share of the target. At least as many as that cost, so that no more than half of the time goes
        to it."""
        fixed = self._coefficients[0]
        return max(self._target / (1 + LEAST_SHARE) - fixed, fixed)

    def decode_seconds(self, decodes: StepWork) -> float:
        """Return the seconds that decodes take beside the fixed cost of their step: the sum of their
        ``decode_costs``."""
        _, token, _, pair, rank = self._coefficients
        return token * decodes.tokens + pair * decodes.decode_pairs + rank * decodes.ranks

    def decode_costs(self, decodes: Iterable[Request]) -> list[float]:
        """Return the seconds that one token of each request adds to a step."""
        _, token, _, pair, rank = self._coefficients
        costs: list[float] = []
        adapters: set[int] = set()
        for request in decodes:
            seconds, entry = token + pair * request.computed, request.adapter
            if entry is not None:
                seconds += rank * entry.rank * (1 if entry.uid in adapters else 1 + ADAPTER_TOKENS)
                adapters.add(entry.uid)
            costs.append(seconds)
        return costs

    def allowance(self, decodes: StepWork, tokens: int) -> Allowance:
        """Return the allowance for prompts in a step with these decodes and room for this many more
        tokens."""
        taken = self.seconds(decodes)
        least = taken * (LEAST_SHARE if decodes.tokens else LEAST_SHARE_ALONE)
        return self._allowance(decodes, tokens, max(self._target - taken, least))

    def allowance_of_decodes(self, decodes: StepWork, tokens: int) -> Allowance:
        """Return the allowance for this many more tokens that count as decodes. They leave prompts the least
        share of the target."""
        seconds = self._target / (1 + LEAST_SHARE) - self.seconds(decodes)
        return self._allowance(decodes, tokens, max(seconds, 0.0))

    def _allowance(self, decodes: StepWork, tokens: int, seconds: float) -> Allowance:
        grown = max(2 * self._largest - decodes.tokens, 2 * GRAIN)
        return Allowance(min(tokens, grown), seconds, tuple(self._coefficients))


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
    """Tokens and seconds that chunks of prompts may take in one step; without ``coefficients`` the time is
    not bounded."""

    def __init__(
        self, tokens: int, seconds: float = math.inf, coefficients: Sequence[float] | None = None
    ) -> None:
        self.paced = coefficients is not None
        self._tokens = tokens
        self._seconds = seconds
        self._coefficients = coefficients or (0.0,) * 5
        self._held = (0, 0.0)

    def has_room(self, request: Request, floor: Floor) -> bool:
        """Whether a request that is to start would get a chunk, or all that the prefix cache has not."""
        if self._tokens <= 0:
            return False
        if not self.paced or floor.of(GRAIN):
            return True
        start = len(request.find_cached()) * request.cache.block_size
        tokens = min(request.remaining - start, GRAIN)
        each, half = self._costs(request, start)
        return floor.of(tokens) > 0 or tokens * (each + half * tokens) <= self._seconds

    def take(self, request: Request, floor: Floor) -> int:
        """Return how many of the request's tokens to compute. They are at least those of ``floor``, however
        little time is left, if the step has room for them."""
        count = min(request.next_piece, self._tokens)
        if self.paced:
            each, half = self._costs(request, request.computed)
            fitting = _fitting(each, half, self._seconds)
            if fitting < count:
                count = min(count, max(fitting // GRAIN * GRAIN, floor.of(count)))
            self._seconds -= count * (each + half * count)
        self._tokens -= count
        floor.take(count)
        return count

    def take_more(self, request: Request, tokens: int) -> int:
        """Return how many of these ``tokens`` of a request to compute, all of them if that is allowed."""
        each, half = self._costs(request, request.computed)
        count = min(tokens, self._tokens, _fitting(each, half, self._seconds))
        self._tokens -= count
        self._seconds -= count * (each + half * count)
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
