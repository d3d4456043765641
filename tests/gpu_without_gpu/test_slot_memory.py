"""Slots on a fake GPU: tokens and their order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.core_on_cuda import SLOTS, Drawn, image_of, run
from torch import Tensor

from aioengine.model.buffer import pageable
from aioengine.model.build import build_runner
from aioengine.model.files.hf_config import read_spec
from aioengine.request import SamplingParams
from aioengine.step import Sampled, SequenceWork, StepBatch

SEEDS = range(3, 23 if os.environ.get("AIOENGINE_FUZZ_RUNS") else 4)


class Alone:
    """A runner on the CPU with one slot, which computes one sequence at a time from its beginning."""

    def __init__(self, model: Path) -> None:
        self._logits = torch.empty(0)
        self._runner = build_runner(
            *(read_spec(model), model), dtype=torch.float32, device="cpu", num_blocks=16, block_size=4,
            max_loras=1, max_lora_rank=8, kernels="torch", sample=self._sample,
        )  # fmt: skip

    def _sample(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        self._logits = logits
        return [Sampled(0) for _ in rows]

    def logits(self, drawn: Drawn) -> Tensor:
        slots, context = self._runner.lora_slots, list(drawn.context)
        assert slots is not None
        rank = 0
        if drawn.adapter is not None:
            image = image_of(drawn.adapter, slots.layout, pageable)
            slots.write(0, image)
            rank = 8
        slot = -1 if drawn.adapter is None else 0
        params, table = SamplingParams(), list(range(16))
        work = SequenceWork("", slot, context, 0, table, True, params, 0, context, len(context))
        self._runner.execute(StepBatch(0, [work], [rank]))
        return self._logits[0]


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.slow
def test_each_token_is_that_of_its_own_adapter_and_context(model: Path, slots: str) -> None:
    """Whatever is swapped, moved, preempted and aborted around its sequence."""
    alone, adapters, count = Alone(model), set[int](), 0
    for seed in SEEDS:
        sim = run(model, slots, seed, played=False, actions=600)
        assert not sim.world.races
        for drawn in sim.drawn:
            logits = alone.logits(drawn)
            assert logits[drawn.token] > logits.max() - 1e-4 * logits.abs().max()
            if drawn.adapter is not None:
                adapters.add(drawn.adapter.uid)
        count += len(sim.drawn)
    assert count > 20 * len(SEEDS) and len(adapters) > 2
