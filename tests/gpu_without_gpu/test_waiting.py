"""How often the host waits for the device in a step, on a GPU made of CPU memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.random_slots import fill_slot

from aioengine.kernels import LoRABatch
from aioengine.kernels.plan.lora import row_weights
from aioengine.model.build import build_runner
from aioengine.model.files.hf_config import read_spec
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

PARAMS = {
    "greedy": [SamplingParams()],
    "random": [SamplingParams(temperature=0.3, top_k=5)],
    "penalties": [SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3)],
    "bias": [SamplingParams(logit_bias={5: 2.0})],
    "everything": [
        SamplingParams(),
        SamplingParams(temperature=0.3, top_p=0.5, min_p=0.1),
        SamplingParams(repetition_penalty=1.2, logit_bias={7: 1.0}),
        SamplingParams(temperature=0.2, presence_penalty=0.5, top_k=3),
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.slow
def test_a_step_waits_once(model: Path, name: str, dtype: torch.dtype) -> None:
    """For its tokens or, without any, for its end: so its inputs may be overwritten afterwards."""
    with FakeCuda() as world:
        runner = build_runner(
            *(read_spec(model), model), dtype=dtype, device="cuda", num_blocks=16, block_size=16,
            max_loras=2, max_lora_rank=8, kernels="torch",
        )  # fmt: skip
        assert runner.lora_slots is not None
        for slot, rank in enumerate((8, 3)):
            fill_slot(runner.lora_slots, slot, rank, torch.Generator().manual_seed(slot), affine=slot == 1)
        ids = list(range(5, 25))
        for sample in (False, True):
            work = [
                SequenceWork(str(i), slot, ids[: 20 - i], 0, [2 * i, 2 * i + 1], sample, params, i, ids, 20)
                for i, (slot, params) in enumerate(zip((-1, 0, 0, 1), 4 * PARAMS[name], strict=False))
            ]
            world.waits = world.staged = 0
            result = runner.execute(StepBatch(0, work, (8, 3)))
            assert (world.waits, world.staged) == (1, 0)
            assert list(result.counts) == [int(sample)] * len(work) and not result.errors
        del runner


def test_scales_are_not_waited_for() -> None:
    """They are sent as all else of a step is."""
    with FakeCuda() as world:
        weights = row_weights(LoRABatch([-1, 0], [1, 2], [8, 8], "cuda", scales=[0.25, 0.5]))
        assert (world.waits, world.staged) == (0, 0)
        assert weights.flatten().tolist() == [1.0, 0.5, 0.5]
