"""Rows of a step for the sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aioengine.model.sampler import sample
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork


def row(
    params: SamplingParams, *, seed: int = 0, history: Sequence[int] = (0,), prompt_len: int = 1
) -> SequenceWork:
    return SequenceWork(
        request_id="r",
        slot=-1,
        tokens=[history[-1]],
        start=len(history) - 1,
        block_table=[],
        sample=True,
        params=params,
        seed=seed,
        history=history,
        prompt_len=prompt_len,
    )


def tokens(logits: torch.Tensor, rows: Sequence[SequenceWork]) -> list[int]:
    return [s.token for s in sample(logits, rows)]
