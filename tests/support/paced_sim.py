"""PacedSim: the core in virtual time, on machines of any speed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hypothesis import strategies as st
from support.full_sim import FullSim

from aioengine.core.pacing import GRAIN
from aioengine.core.state import Request
from aioengine.step import SequenceWork, StepBatch
from aioengine.testing import LIMITS

TARGET = 0.2
PAIR_TOKENS = 1 / 3000
"""What the core is told; the devices below differ from it."""


class Machine(NamedTuple):
    """Seconds of a step; the ratios are relative to what is plausible for any model."""

    token: float
    fixed: float
    """In tokens, and so on."""
    pair: float
    decode_pair: float
    rank: float
    memory: float
    """Tokens that are free, because weights are waited for meanwhile."""

    def seconds(self, sequences: list[SequenceWork], ranks: list[int]) -> float:
        tokens = sum(len(work.tokens) for work in sequences)
        cost = self.fixed + max(tokens, self.memory)
        for work in sequences:
            count = len(work.tokens)
            pairs = sum(work.start + i for i in range(count))
            cost += pairs * (self.decode_pair if count == 1 else self.pair)
            cost += 0 if work.slot < 0 else ranks[work.slot] * count * self.rank
        return self.token * cost

    def bound(self, batch: StepBatch) -> float:
        """What a step may take at most: the target or, where decodes take it up, a third more than these
        (without decodes, twice the fixed cost); and three of the smallest chunks on top."""
        decodes = [work for work in batch.sequences if len(work.tokens) == 1 and work.start > 0]
        ranks = list(batch.slot_ranks)
        deepest = max(work.start for work in batch.sequences)
        chunk = GRAIN * (1 + deepest * self.pair + max(ranks) * self.rank)
        alone = self.seconds(decodes, ranks)
        return max(TARGET, alone * (4 / 3 if decodes else 2)) + 3 * chunk * self.token


MACHINES = st.builds(
    Machine,
    token=st.floats(math.log(5e-5), math.log(1e-2)).map(math.exp),
    fixed=st.floats(2, 30),
    pair=st.floats(0.3, 4).map(lambda x: x * PAIR_TOKENS),
    decode_pair=st.floats(0.5, 10).map(lambda x: x * PAIR_TOKENS),
    rank=st.floats(0.3, 5).map(lambda x: x * 0.004),
    memory=st.floats(1, 30),
)
MIDDLING = Machine(5e-4, 10, PAIR_TOKENS, 3 * PAIR_TOKENS, 0.004, 8)


class PacedSim(FullSim):
    """Steps take what ``machine`` says, times ``slowness``; ``seconds`` has each."""

    def __init__(self, machine: Machine, **limits: object) -> None:
        super().__init__(
            LIMITS._replace(
                **{
                    "num_blocks": 6000,
                    "block_size": 16,
                    "max_num_seqs": 32,
                    "max_num_batched_tokens": 2048,
                    "max_model_len": 9000,
                    "max_step_seconds": TARGET,
                    "pair_tokens": PAIR_TOKENS,
                    **limits,
                }
            ),
        )
        self.machine = machine
        self.slowness = 1.0
        self.forced = 0
        """Tokens that are forced after each one of a constrained request."""
        self.batches: list[StepBatch] = []
        self.seconds: list[float] = []

    def one_step(self) -> StepBatch | None:
        while self.loads:
            self.finish_load()
        while self.copies:
            self.finish_copy()
        batch = self.schedule()
        if batch is not None:
            seconds = self.machine.seconds(list(batch.sequences), list(batch.slot_ranks)) * self.slowness
            self.batches.append(batch)
            self.seconds.append(seconds)
            self.now += seconds
            self.finish_step(seconds)
        return batch

    def prompt(self, tokens: int, max_tokens: int = 1, adapter: str | None = None, **options: Any) -> Request:
        self.count += 1
        prompt = [self.count + 2] * tokens
        return self.add(adapter, prompt=prompt, max_tokens=max_tokens, **options)

    def forced_after(self, history: list[int]) -> int:
        return self.forced
