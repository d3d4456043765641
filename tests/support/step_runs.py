"""Single steps of a whole model whose slots hold random adapters, for tests that compare logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.random_slots import fill_slot
from torch import Tensor

from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import ModelSpec
from aioengine.request import SamplingParams
from aioengine.step import Sampled, SequenceWork, StepBatch


class StepRun:
    """A runner with adapters of these ranks in its slots, and the logits [N, vocab] of its last step."""

    def __init__(
        self,
        model: Path,
        ranks: Sequence[int] = (),
        *,
        affine: int = -1,
        spec: ModelSpec | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        """``affine`` is the slot that scales and shifts; ``options`` are those of ``build_runner``."""
        self.logits = torch.empty(0)
        self.ranks, self._affine = ranks, affine
        self.runner = build_runner(
            *(spec or read_spec(model), model), dtype=dtype, device=device, max_loras=len(ranks),
            max_lora_rank=max(ranks, default=8), sample=self.sample, **options,
        )  # fmt: skip
        self.fill_slots()

    def fill_slots(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for slot, rank in enumerate(self.ranks):
            assert self.runner.lora_slots is not None
            fill_slot(self.runner.lora_slots, slot, rank, generator, affine=slot == self._affine)

    def sample(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        assert len(logits) == len(rows)
        self.logits = logits.float().cpu()
        return [Sampled(0) for _ in rows]

    def execute(
        self, sequences: Sequence[tuple[int, int, Sequence[int], Sequence[int]]], unasked: Sequence[int] = ()
    ) -> Tensor:
        """One step over (slot, start, all tokens, block table). Those ``unasked`` get no token."""
        work = [
            SequenceWork(
                *(str(i), slot, tokens[start:], start, table, i not in unasked),
                *(SamplingParams(), 0, tokens, len(tokens)),
            )
            for i, (slot, start, tokens, table) in enumerate(sequences)
        ]
        self.runner.execute(StepBatch(0, work, list(self.ranks)))
        return self.logits
