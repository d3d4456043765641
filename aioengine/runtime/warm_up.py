"""An engine's first steps, taken before the first request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

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
    more: list[StepBatch] = []
    if plan.device == "cuda":
        more = [*kernel_shapes(plan, config), largest_step(plan, config)]
        for batch in more:
            await run_step(device, batch)
    for name in {work.request_id for batch in (*more, *(b for b, _ in steps)) for work in batch.sequences}:
        device.forget(name)
    return steps


def first_requests(plan: MemoryPlan) -> Iterator[StepBatch]:
    """Yield the steps of two requests, a greedy and a sampled one: a prompt, and a token after it."""
    tokens = min(_PROMPT, plan.max_model_len - 1)
    width = -(-(tokens + 1) // plan.block_size)
    history = [0] * (tokens + 1)
    for start, count in ((0, tokens), (tokens, 1)):
        sequences = [
            SequenceWork(
                request_id=f"warm-up-{i}",
                slot=-1,
                tokens=[0] * count,
                start=start,
                block_table=list(range(i * width, (i + 1) * width)),
                sample=True,
                params=params,
                seed=0,
                history=history[: start + count],
                prompt_len=tokens,
            )
            for i, params in enumerate(_PARAMS[: plan.num_blocks // width])
        ]
        yield StepBatch(0, sequences, [0] * plan.num_slots)


def kernel_shapes(plan: MemoryPlan, config: EngineConfig) -> Iterator[StepBatch]:
    """Yield steps that need each kernel in every form that later steps need.

    Kernels that are compiled when they are first needed take up to a second each. Their forms differ by the
    length of segments, by adapter or none, and by the number of programs that share a long context. Every
    block table contains block 0 only: the results have no meaning, and nothing is sampled from them.
    """
    most = min(config.max_num_batched_tokens, plan.max_model_len - 1)
    slots = (-1,) if config.lora is None else (-1, 0)
    rank = 0 if config.lora is None else config.lora.max_lora_rank
    ranks = [rank, *[0] * (plan.num_slots - 1)][: plan.num_slots]
    contexts = [_FIRST_CONTEXT // 2, *(_FIRST_CONTEXT << i for i in range(_CONTEXTS))]
    for slot in slots:
        for tokens in (_PROMPT, most):
            yield StepBatch(0, [_work(plan, slot, 0, tokens)], ranks)
        for context in contexts:
            if context < plan.max_model_len:
                yield StepBatch(0, [_work(plan, slot, context, 1)], ranks)


def largest_step(plan: MemoryPlan, config: EngineConfig) -> StepBatch:
    """Return a step with as many tokens and sequences as a step can have, all of which are sampled with
    penalties: it takes the most memory. Its results have no meaning, as above."""
    tokens, longest = config.max_num_batched_tokens, plan.max_model_len - 1
    rows = min(config.max_num_seqs, tokens)
    slot = -1 if config.lora is None else 0
    rank = 0 if config.lora is None else config.lora.max_lora_rank
    counts = [min(longest, tokens // rows + (i < tokens % rows)) for i in range(rows)]
    work = [
        msgspec.structs.replace(
            _work(plan, slot, 0, count),
            request_id=f"warm-up-{i}",
            sample=True,
            params=_DEAREST,
            history=[0] * count,
        )
        for i, count in enumerate(counts)
    ]
    return StepBatch(0, work, [rank, *[0] * (plan.num_slots - 1)][: plan.num_slots])


def _work(plan: MemoryPlan, slot: int, start: int, count: int) -> SequenceWork:
    table: Sequence[int] = [0] * -(-(start + count) // plan.block_size)
    return SequenceWork(
        request_id="warm-up",
        slot=slot,
        tokens=[0] * count,
        start=start,
        block_table=list(table),
        sample=False,
        params=_PARAMS[0],
        seed=0,
        history=[],
        prompt_len=start + count,
    )
