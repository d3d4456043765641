"""An engine's first steps, while it starts: threads, kernels and memory are there when somebody waits."""

from __future__ import annotations

from aioengine.executors.base import Device
from aioengine.memory_plan import MemoryPlan
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

_PROMPT = 32
_PARAMS = (SamplingParams(), SamplingParams(temperature=1.0))


async def warm_up(device: Device, plan: MemoryPlan) -> list[tuple[StepBatch, float]]:
    """A prompt and a token after it, for a greedy and a sampled request that nobody hears of.

    They leave keys and values in blocks that nothing refers to. Returns the steps and their seconds.
    Raises what the device raises.
    """
    tokens = min(_PROMPT, plan.max_model_len - 1)
    width = -(-(tokens + 1) // plan.block_size)
    requests = range(min(len(_PARAMS), plan.num_blocks // width))
    history = [0] * (tokens + 1)
    ranks = [0] * plan.num_slots
    steps: list[tuple[StepBatch, float]] = []
    for start, count in ((0, tokens), (tokens, 1)):
        sequences = [
            SequenceWork(
                request_id=f"warm-up-{i}",
                slot=-1,
                tokens=[0] * count,
                start=start,
                block_table=list(range(i * width, (i + 1) * width)),
                sample=True,
                params=_PARAMS[i],
                seed=0,
                history=history[: start + count],
                prompt_len=tokens,
            )
            for i in requests
        ]
        batch = StepBatch(0, sequences, ranks)
        steps.append((batch, (await device.execute(batch)).seconds))
    for i in requests:
        device.forget(f"warm-up-{i}")
    return steps
