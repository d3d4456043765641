"""An engine's first steps, taken before the first request."""

from __future__ import annotations

from collections.abc import Iterator

from aioengine.config import EngineConfig
from aioengine.executors.base import Device, run_step
from aioengine.memory_plan import MemoryPlan
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

_PROMPT = 32
_PARAMS = (SamplingParams(), SamplingParams(temperature=1.0))
_DEAREST = SamplingParams(temperature=1.0, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.1)
"""Parameters whose sampling takes the most memory."""
_FIRST_CONTEXT, _CONTEXTS = 512, 6
"""Contexts of decodes on a GPU, in tokens: half of the first, the first, and then each twice the one
before."""


async def warm_up(device: Device, plan: MemoryPlan, config: EngineConfig) -> list[tuple[StepBatch, float]]:
    """Run an engine's first steps, so that threads, kernels and memory are ready before the first request.

    They write to blocks that nothing refers to, and no listener hears of them. Returns the steps that
    compute real sequences, and their seconds. Raises what the device raises.
    """
    steps = [(batch, (await run_step(device, batch)).seconds[0]) for batch in first_requests(plan)]
    batches = [batch for batch, _ in steps]
    if plan.device == "cuda":
        for batch in (*kernel_shapes(plan, config), largest_step(plan, config)):
            await run_step(device, batch)
            batches.append(batch)
    if device.forget is not None:
        for name in {work.request_id for batch in batches for work in batch.sequences}:
            device.forget(name)
    return steps


def first_requests(plan: MemoryPlan) -> Iterator[StepBatch]:
    """Yield the steps of two requests, a greedy and a sampled one: a prompt, and a token after it."""
    tokens = min(_PROMPT, plan.max_model_len - 1)
    width = -(-(tokens + 1) // plan.block_size)
    for start, count in ((0, tokens), (tokens, 1)):
        sequences = [_work(plan, -1, start, count, i, params) for i, params in enumerate(_PARAMS)]
        for i, work in enumerate(sequences):  # each in its own blocks
            work.prompt_len, work.block_table = tokens, list(range(i * width, (i + 1) * width))
        del sequences[plan.num_blocks // width :]
        yield StepBatch(0, sequences, [0] * plan.num_slots)


def kernel_shapes(plan: MemoryPlan, config: EngineConfig) -> Iterator[StepBatch]:
    """Yield steps that need each kernel in every form that later steps need.

    Kernels that are compiled when they are first needed take up to a second each. Their forms differ by the
    length of segments, by adapter or none, and by the number of programs that share a long context. Every
    block table contains block 0 only: the results have no meaning, and nothing is sampled from them.
    """
    most = min(config.max_num_batched_tokens, plan.max_model_len - 1)
    contexts = [_FIRST_CONTEXT // 2, *(_FIRST_CONTEXT << i for i in range(_CONTEXTS))]
    for slot in (-1,) if config.lora is None else (-1, 0):
        for start, tokens in ((0, _PROMPT), (0, most), *((context, 1) for context in contexts)):
            if start < plan.max_model_len:
                yield StepBatch(0, [_work(plan, slot, start, tokens)], _ranks(plan, config))


def largest_step(plan: MemoryPlan, config: EngineConfig) -> StepBatch:
    """Return a step with as many tokens and sequences as a step can have, all of which are sampled with
    penalties: it takes the most memory. Its results have no meaning, as above."""
    tokens, longest = config.max_num_batched_tokens, plan.max_model_len - 1
    rows = min(config.max_num_seqs, tokens)
    slot = -1 if config.lora is None else 0
    work = [
        _work(plan, slot, 0, min(longest, tokens // rows + (i < tokens % rows)), i, _DEAREST)
        for i in range(rows)
    ]
    return StepBatch(0, work, _ranks(plan, config))


def _ranks(plan: MemoryPlan, config: EngineConfig) -> list[int]:
    """Return the ranks in the slots, of which the first has the largest adapter that there may be."""
    rank = 0 if config.lora is None else config.lora.max_lora_rank
    return [rank, *[0] * (plan.num_slots - 1)][: plan.num_slots]


def _work(
    plan: MemoryPlan,
    slot: int,
    start: int,
    count: int,
    number: int = 0,
    params: SamplingParams | None = None,
) -> SequenceWork:
    """Return a sequence in block 0 that is sampled if it has ``params``."""
    return SequenceWork(
        request_id=f"warm-up-{number}",
        slot=slot,
        tokens=[0] * count,
        start=start,
        block_table=[0] * -(-(start + count) // plan.block_size),
        sample=params is not None,
        params=params or _PARAMS[0],
        seed=0,
        history=[0] * (start + count) if params is not None else [],
        prompt_len=start + count,
    )
