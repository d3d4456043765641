"""On a GPU, the host waits in a step for the tokens that were sampled, and for nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support.tiny_models import build_model

from aioengine.model.build import build_runner
from aioengine.model.decode_graphs import DecodeLimits
from aioengine.model.files.resolve import read_spec
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RANKS = (4, 8)


def sequences(slots: list[int], start: int, count: int, params: SamplingParams) -> list[SequenceWork]:
    work = []
    for i, slot in enumerate(slots):
        ids = [(7 * i + 3 * position) % 200 + 5 for position in range(start + count)]
        table = list(range(4 * i, 4 * i + -(-(start + count) // 16)))
        work.append(SequenceWork(str(i), slot, ids[start:], start, table, True, params, i, ids, count))
    return work


@pytest.mark.parametrize("played", [False, True])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize(
    ("params", "allowed"),
    [(SamplingParams(), 1), (SamplingParams(temperature=0.7, top_k=20), 2)],
    ids=["greedy", "random"],
)
def test_a_step_waits_for_its_tokens_only(
    params: SamplingParams, allowed: int, kernels: str, played: bool, tmp_path: Path
) -> None:
    model = build_model(tmp_path, "llama")
    runner = build_runner(
        *(read_spec(model), model), dtype=torch.float32, device="cuda", num_blocks=64, block_size=16,
        max_loras=2, max_lora_rank=8, kernels=kernels,
        fixed_decode=DecodeLimits(8, 256) if played else None,
    )  # fmt: skip
    slots = [-1, 0, 0, 1]
    prompt, decode = (sequences(slots, start, count, params) for start, count in ((0, 20), (20, 1)))
    for work in (prompt, decode):  # compiles kernels
        runner.execute(StepBatch(0, work, RANKS))
    for work in (prompt, decode):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                runner.execute(StepBatch(1, work, RANKS))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
        assert len(waits) == allowed, [f"{w.filename}:{w.lineno}: {w.message}" for w in waits]
