"""Chooses what attends to prompts, by timing the candidates on the device, with the model's own shapes."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from aioengine.kernels.backend import Backend, LayerCache, Scores
from aioengine.kernels.plan.attention import AttentionPlan, Span

logger = logging.getLogger("aioengine")

TOKENS = 2048
"""Tokens of a step that is timed: what is computed without a recording is about as large."""
TURNS = 5
"""Times that each candidate takes, in turns; the median counts."""

Clock = Callable[[], float]


class AttentionCase(NamedTuple):
    """What a model asks of attention, on one rank."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    layers: tuple[Scores, ...]
    """Windows, scales and caps of each layer."""


def fastest(
    candidates: Sequence[Backend], case: AttentionCase, device: torch.device, clock: Clock | None = None
) -> Backend:
    """Return the candidate that attends in the least time, and say so in the log. One that fails is left out;
    the first is expected not to.

    Timed are all layers of two steps, with what the host does for them: a prompt of ``TOKENS``, and as many
    tokens behind these. It takes some milliseconds, but more where kernels are compiled at their first use.
    """
    works = _works(case, device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock or time.perf_counter)()

    times: dict[str, list[float]] = {}
    failed: set[str] = set()
    for turn in range(TURNS + 1):
        for backend in candidates:
            if backend.name in failed:
                continue
            try:
                began = wait()
                for work in works:
                    work(backend)
                taken = wait() - began
            except Exception as error:  # of its compiler, or of the driver
                if backend is candidates[0]:
                    raise
                failed.add(backend.name)
                logger.warning(
                    "attention by %s does not work here: %s: %s. %s is used in its place",
                    *(backend.name, type(error).__name__, error, candidates[0].name),
                )
                continue
            if turn:  # in the first one kernels are compiled
                times.setdefault(backend.name, []).append(taken)
    medians = {name: statistics.median(each) for name, each in times.items() if name not in failed}
    best = min(candidates, key=lambda backend: medians.get(backend.name, float("inf")))
    _say(medians, best.name)
    return best


def _works(case: AttentionCase, device: torch.device) -> list[Callable[[Backend], object]]:
    """Return the steps, over a cache that holds nothing in particular."""
    blocks = -(-2 * TOKENS // case.block_size)
    shape = (blocks, case.block_size, case.kv_heads, case.head_dim)
    cache = LayerCache(*(torch.zeros(shape, dtype=case.dtype, device=device) for _ in range(2)))
    rows = (TOKENS, case.heads + 2 * case.kv_heads, case.head_dim)
    qkv = torch.zeros(rows, dtype=case.dtype, device=device)

    def work(start: int) -> Callable[[Backend], object]:
        def attend(backend: Backend) -> None:
            plan = AttentionPlan([Span(0, TOKENS, start)], [range(blocks)], case.block_size, device)
            for scores in case.layers:
                backend.paged_attention(qkv, cache, plan, scores)

        return attend

    return [work(0), work(TOKENS)]


def _say(medians: Mapping[str, float], best: str) -> None:
    each = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in medians.items())
    logger.info(
        "attention of prompts: %s for two steps of %d tokens; %s is used (AIOENGINE_KERNELS names another)",
        *(each, TOKENS, best),
    )
