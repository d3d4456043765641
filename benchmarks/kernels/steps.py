"""Steps of a model without an engine around them, and how they grow."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from aioengine.model.build import build_runner
from aioengine.model.decode_graphs import DecodeLimits
from aioengine.model.files.resolve import resolve_model
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch
from benchmarks.runner import Call, Calls
from benchmarks.shared.engines import fill_slots, random_adapters, spec_of

BLOCK = 16
GREEDY = SamplingParams()


class Steps:
    """A model with random adapters of one rank in ``slots`` slots, and a KV cache of ``kv_tokens``."""

    def __init__(
        self, model: str, *, kv_tokens: int, slots: int = 0, rank: int = 16, lora_dtype: str = "bfloat16",
        device: str = "cpu", cache: str = "auto", played: DecodeLimits | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.spec, self.rank = spec_of(model), rank
        self.runner = build_runner(
            self.spec, resolve_model(model), dtype=torch.bfloat16, device=device, block_size=BLOCK,
            num_blocks=-(-kv_tokens // BLOCK) + 64, max_loras=slots, max_lora_rank=rank,
            lora_dtype=getattr(torch, lora_dtype), kv_cache_dtype=cache,
            fixed_decode=played, **options,
        )  # fmt: skip
        for memory in (*self.runner.kv_cache.k, *self.runner.kv_cache.v):
            memory.fill_(1)  # memory that was never written would be read from one page
        if slots:
            with random_adapters(model, 1, rank) as paths:
                fill_slots(self.runner, *paths.values())

    def step(self, sequences: int, tokens: int, start: int, adapters: int = 0) -> Callable[[], object]:
        """Build a step of ``sequences`` that compute ``tokens`` each from position ``start`` on; sequence i
        uses slot i % ``adapters``, or no adapter if there are none. Their blocks lie in random order."""
        width = -(-(start + tokens) // BLOCK)
        blocks = list(range(sequences * width))
        random.Random(0).shuffle(blocks)
        rng = random.Random(1)
        work = []
        for i, slot in enumerate(sorted(j % adapters if adapters else -1 for j in range(sequences))):
            ids = [rng.randrange(100, self.spec.vocab_size - 100) for _ in range(tokens)]
            table = blocks[i * width : (i + 1) * width]
            work.append(SequenceWork(str(i), slot, ids, start, table, True, GREEDY, 0, ids, tokens))
        slots = 0 if self.runner.lora_slots is None else self.runner.lora_slots.max_loras
        batch = StepBatch(0, work, [self.rank] * slots)
        return lambda: self.runner.execute(batch)


def step(
    *, model: str = "smollm2-135m", sequences: tuple[int, ...] = (32,), tokens: tuple[int, ...] = (1,),
    contexts: tuple[int, ...] = (160,), adapters: tuple[int, ...] = (0, 8), ranks: tuple[int, ...] = (16,),
    quantizations: tuple[str, ...] = ("none",), caches: tuple[str, ...] = ("auto",),
    lora_dtypes: tuple[str, ...] = ("bfloat16",), threads: tuple[int, ...] = (), device: str = "cpu",
    played: bool = True, rounds: int = 7,
) -> Iterator[Calls]:  # fmt: skip
    """A step by each combination of the options: decode steps with --tokens 1, prompts with --contexts 0.

    On a busy machine, processor time with --threads 1 says more. On a GPU (--device cuda) decode steps are
    played back from CUDA graphs, unless --no-played.
    """
    most = max(sequences)
    limits = DecodeLimits(most, max(contexts) + 1) if device != "cpu" and played else None
    calls: dict[str, Call] = {}
    for quantization, cache, lora_dtype, rank in itertools.product(quantizations, caches, lora_dtypes, ranks):
        made = Steps(
            model, kv_tokens=most * (max(contexts) + max(tokens) + BLOCK), slots=max(adapters), rank=rank,
            lora_dtype=lora_dtype, device=device, cache=cache, played=limits, quantization=quantization,
        )  # fmt: skip
        settings = itertools.product(
            sequences, tokens, contexts, adapters, threads or [torch.get_num_threads()]
        )
        for count, new, context, using, cores in settings:
            if using > count:
                continue
            words = [
                f"{count} x {new:,} after {context:,}",
                f"{using} adapters of rank {rank}" if using else "base",
            ]
            words += [quantization] * (len(quantizations) > 1) + [f"{cache} cache"] * (len(caches) > 1)
            words += [lora_dtype] * (len(lora_dtypes) > 1) + [f"{cores} threads"] * (len(threads) > 1)
            calls[", ".join(words)] = partial(_run, made.step(count, new, context, using), cores, count * new)
    yield Calls(f"Steps of {model}, {device}", calls, rounds)


def _run(step: Callable[[], object], threads: int, tokens: int) -> float:
    torch.set_num_threads(threads)
    step()
    return tokens


CASES = (step,)
