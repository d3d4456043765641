"""Steps a :class:`ModelRunner` by hand, without the engine's core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from support.step_tokens import tokens_of

from aioengine.adapters.store import AdapterStore, Draft
from aioengine.model.runner import ModelRunner
from aioengine.model.slots.image import AdapterImage
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch, StepResult


@dataclass
class Running:
    """A sequence under way: the first ``computed`` of ``tokens`` are in the KV cache."""

    tokens: list[int]
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    prompt_len: int = 0

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


class Driver:
    """Allocates block tables (scattered on purpose) and appends the sampled tokens."""

    def __init__(self, runner: ModelRunner, lora_dtype: torch.dtype) -> None:
        self.runner = runner
        self.lora_dtype = lora_dtype
        n = runner.kv_cache.num_blocks
        self.free = [(7 * i) % n for i in range(n)] if n % 7 else list(range(n))
        self.ranks = [0] * (runner.lora_slots.max_loras if runner.lora_slots else 0)

    def add(self, tokens: Sequence[int], slot: int = -1) -> Running:
        return Running(list(tokens), slot)

    def load(self, slot: int, folder: Path) -> AdapterImage:
        """Reads a PEFT folder and puts it into a slot."""
        slots = self.runner.lora_slots
        assert slots is not None
        store = AdapterStore(
            slots.layout,
            dtype=self.lora_dtype,
            affine_dtype=self.runner.model.dtype,
            weights=self.runner.model.base_weight,
        )
        draft = store.begin(folder.name, str(folder))
        self.share(draft)
        image = store.finish(draft)
        slots.write(slot, image)
        self.ranks[slot] = image.rank
        return image

    def share(self, draft: Draft) -> None:
        """What other ranks must have said before an adapter is finished."""

    def batch(self, *work: tuple[Running, int]) -> StepBatch:
        """A step over (sequence, number of tokens to compute)."""
        block_size = self.runner.kv_cache.block_size
        rows = []
        for s, count in sorted(work, key=lambda item: item[0].slot):
            stop = s.computed + count
            while len(s.blocks) * block_size < stop:
                s.blocks.append(self.free.pop())
            rows.append(
                SequenceWork(
                    request_id=str(id(s)),
                    slot=s.slot,
                    tokens=s.tokens[s.computed : stop],
                    start=s.computed,
                    block_table=list(s.blocks),
                    sample=stop == len(s.tokens),
                    params=SamplingParams(),
                    seed=0,
                    history=list(s.tokens),
                    prompt_len=s.prompt_len,
                )
            )
        return StepBatch(0, rows, self.ranks)

    def step(self, *work: tuple[Running, int]) -> None:
        batch = self.batch(*work)
        found = self.sampled(self.runner.execute(batch))
        ordered = sorted(work, key=lambda item: item[0].slot)
        for (s, count), row, tokens in zip(ordered, batch.sequences, found, strict=True):
            s.computed += count
            assert len(tokens) == row.sample
            s.tokens += tokens

    def sampled(self, result: StepResult) -> list[Sequence[int]]:
        return tokens_of(result)

    def run(self, *sequences: Running, new_tokens: int, chunk: int = 10**9) -> None:
        """Steps all sequences together, prompts in chunks, until each has ``new_tokens`` more."""
        goals = {id(s): len(s.tokens) + new_tokens for s in sequences}
        while pending := [s for s in sequences if len(s.tokens) < goals[id(s)]]:
            self.step(*((s, min(chunk, len(s.tokens) - s.computed)) for s in pending))
