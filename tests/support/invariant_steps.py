"""Steps of a tiny model in random company, and what each sequence's logits are alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from support.random_slots import fill_slot
from torch import Tensor

from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec
from aioengine.model.runner import ModelRunner
from aioengine.model.spec import Quantization
from aioengine.request import SamplingParams
from aioengine.step import Sampled, SequenceWork, StepBatch

BLOCK, BLOCKS = 16, 160
SLOTS, MAX_RANK = 3, 64
RANKS = (16, 5, 64, 33, 1)
"""Of the adapters, of which there are more than slots."""
TEXTS = 2
"""Distinct prompts of each adapter: sequences share prefixes."""


class Sequence_(NamedTuple):
    adapter: int
    """-1: the base model."""
    tokens: tuple[int, ...]


class InvariantSteps:
    """A runner over a tiny model whose adapters change slots."""

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype,
        kernels: str,
        quantization: Quantization,
        *,
        int8_cache: bool = False,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        self._logits = torch.empty(0)
        self._in_slot = [-1] * SLOTS
        self.runner = build_runner(
            *(read_spec(model), model), dtype=dtype, device="cpu", num_blocks=BLOCKS, block_size=BLOCK,
            max_loras=SLOTS, max_lora_rank=MAX_RANK, kernels=kernels, quantization=quantization,
            sample=self._sample, kv_cache_dtype="int8" if int8_cache else "auto", lora_dtype=lora_dtype,
        )  # fmt: skip

    def _sample(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        self._logits = logits.clone()
        return [Sampled(0) for _ in rows]

    def place(self, slot: int, adapter: int) -> None:
        """Fills a slot; the same adapter always gets the same matrices."""
        self._in_slot[slot] = adapter
        generator = torch.Generator().manual_seed(adapter)
        slots, rank = self.runner.lora_slots, RANKS[adapter]
        assert slots is not None
        fill_slot(slots, slot, rank, generator)

    def slot_of(self, adapter: int) -> int:
        return -1 if adapter < 0 else self._in_slot.index(adapter)

    def is_placed(self, adapter: int) -> bool:
        return adapter < 0 or adapter in self._in_slot

    def step(self, work: Sequence[tuple[Sequence_, int, int, Sequence[int]]]) -> Tensor:
        """Logits [N, vocab] after ``(sequence, first, last + 1, block table)`` each, sorted by slot."""
        sequences = [
            SequenceWork(
                *(str(i), self.slot_of(s.adapter), s.tokens[begin:end], begin, table, True),
                *(SamplingParams(), 0, s.tokens[:end], len(s.tokens)),
            )
            for i, (s, begin, end, table) in enumerate(work)
        ]
        ranks = [0 if adapter < 0 else RANKS[adapter] for adapter in self._in_slot]
        self.runner.execute(StepBatch(0, sequences, ranks))
        return self._logits

    def alone(self, sequence: Sequence_) -> Tensor:
        """Logits [tokens, vocab], one token a step, with one thread and nobody else."""
        if not self.is_placed(sequence.adapter):
            self.place(0, sequence.adapter)
        table = range(-(-len(sequence.tokens) // BLOCK))
        steps = [self.step([(sequence, i, i + 1, table)])[0] for i in range(len(sequence.tokens))]
        return torch.stack(steps)


def make_sequences(seed: int) -> list[Sequence_]:
    """Of the base model and of every adapter, all of one of few beginnings, so that prefixes are shared."""
    rng = random.Random(seed)
    found = []
    for adapter in (-1, *range(len(RANKS))):
        for _ in range(TEXTS):
            tokens = [rng.randrange(3, 250) for _ in range(rng.choice([5, 40, 70, 150]))]
            found.append(Sequence_(adapter, tuple(tokens)))
    return found


class Live:
    """A sequence that is being computed."""

    def __init__(self, index: int, sequence: Sequence_, table: list[int], done: int) -> None:
        self.index, self.sequence, self.table, self.done = index, sequence, table, done


def random_steps(
    steps: InvariantSteps,
    sequences: Sequence[Sequence_],
    rng: random.Random,
    count: int,
    set_threads: Callable[[int], None],
    found: Callable[[int, int, Tensor], None],
) -> None:
    """Steps with random arrivals, chunks, preemptions, swaps, shared prefixes and threads.

    Tells ``found(sequence, token, logits)`` after each chunk.
    """
    free = list(range(BLOCKS))
    rng.shuffle(free)
    live: list[Live] = []
    for _ in range(count):
        set_threads(rng.choice([1, 2]))
        while len(live) < 8 and rng.random() < 0.7:
            i = rng.randrange(len(sequences))
            table = [free.pop() for _ in range(-(-len(sequences[i].tokens) // BLOCK))]
            # What another run of the same sequence has computed is shared, as the prefix cache does.
            done = 0
            twin = next((other for other in live if other.index == i and other.done > BLOCK), None)
            if twin is not None and rng.random() < 0.5:
                blocks = (twin.done - 1) // BLOCK
                done = blocks * BLOCK
                copy_blocks(steps.runner, twin.table[:blocks], table[:blocks])
            live.append(Live(i, sequences[i], table, done))
        if rng.random() < 0.3:
            wanted = [s.sequence.adapter for s in live if not steps.is_placed(s.sequence.adapter)]
            if wanted:
                steps.place(rng.randrange(SLOTS), rng.choice(wanted))
        if live and rng.random() < 0.1:
            rng.choice(live).done = 0  # preempted: computed anew
        chosen = [s for s in live if steps.is_placed(s.sequence.adapter) and rng.random() < 0.8]
        rng.shuffle(chosen)
        chosen.sort(key=lambda s: steps.slot_of(s.sequence.adapter))
        if not chosen:
            continue
        work = []
        for s in chosen:
            left = len(s.sequence.tokens) - s.done
            length = min(left, rng.choice([1, 1, 1, 2, 7, 30, 100]))
            work.append((s.sequence, s.done, s.done + length, s.table))
        logits = steps.step(work)
        for s, (_, _, end, _), row in zip(chosen, work, logits, strict=True):
            s.done = end
            found(s.index, end - 1, row)
            if end == len(s.sequence.tokens):
                live.remove(s)
                free.extend(s.table)


def copy_blocks(runner: ModelRunner, source: Sequence[int], target: Sequence[int]) -> None:
    for memory in (*runner.kv_cache.k, *runner.kv_cache.v):
        memory[list(target)] = memory[list(source)]
