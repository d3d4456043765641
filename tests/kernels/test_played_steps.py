"""Steps that are recorded and played back, against the same model without: on a GPU with CUDA graphs,
without one in Triton's interpreter (``test_triton.py`` runs this file there), where recorded is what is
computed anew on the same memory.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_slots import random_image
from support.step_runs import StepRun
from support.tiny_models import build_model
from support.triton_here import DEVICE, needs_triton
from torch import Tensor

from aioengine.model.decode_graphs import CudaGraphs, DecodeLimits, Step
from aioengine.model.parallel.group import Group, Shard
from aioengine.model.slots.tokens import TokenTable, TokenTables, TrainedTokens

pytest.importorskip("triton")
pytestmark = needs_triton
RANKS = (4, 8, 3)
AFFINE = 2
"""The slot that scales and shifts."""
MOST, BLOCKS = 5, 40


@functools.cache
def model() -> Path:
    return build_model(Path(tempfile.mkdtemp()), "qwen3", num_hidden_layers=2)


class Run(StepRun):
    """Its steps count how often they are played."""

    def __init__(
        self,
        *,
        played: bool,
        slots: bool = True,
        mixed: tuple[int, ...] = (),
        affine: int = AFFINE,
        **options: Any,
    ) -> None:
        self.played: list[int] = []
        super().__init__(
            *(model(), RANKS if slots else ()), affine=affine, device=DEVICE, num_blocks=BLOCKS, block_size=4,
            kernels="triton", fixed_decode=DecodeLimits(MOST, 64, mixed) if played else None,
            record=self._record, **options,
        )  # fmt: skip
        self.fill_caches(float("nan"))
        self.played.clear()

    def fill_caches(self, value: float) -> None:
        for cache in (*self.runner.kv_cache.k, *self.runner.kv_cache.v):
            cache.fill_(value)

    def _record(self, step: Step) -> Step:
        """As on a GPU, and counts how often it is played."""
        recorded = CudaGraphs(torch.device(DEVICE))(step) if DEVICE == "cuda" else step

        def again() -> None:
            self.played.append(1)
            recorded()

        return again

    def step(self, sequences: Sequence[tuple[int, int, int]], unasked: Sequence[int] = ()) -> Tensor:
        """One step over (slot, position, tokens); sequence i has blocks of its own, scattered."""
        work = []
        for i, (slot, start, count) in enumerate(sequences):
            tokens = [(11 * i + 7 * position) % 200 + 5 for position in range(start + count)]
            table = [(7 * (8 * i + j)) % BLOCKS for j in range(-(-len(tokens) // 4))]
            work.append((slot, start, tokens, table))
        return self.execute(work, unasked)

    def caches(self) -> list[Tensor]:
        return [cache.cpu() for cache in (*self.runner.kv_cache.k, *self.runner.kv_cache.v)]


@pytest.fixture(scope="module")
def runs() -> tuple[Run, Run]:
    return Run(played=True), Run(played=False)


def close(found: Tensor, expected: Tensor) -> None:
    assert not expected.isnan().any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "slots",
    [(-1, -1, -1), (-1, 0, 0, 1, 1), (1,), (0, 1, 2)],
    ids=["base", "full", "one", "affine"],
)
def test_played_steps_are_those_of_the_eager_model(runs: tuple[Run, Run], slots: tuple[int, ...]) -> None:
    played, eager = runs
    lengths = (6, 1, 3, 2, 1)
    prompts = [(slot, 0, length) for slot, length in zip(slots, lengths, strict=False)]
    close(played.step(prompts), eager.step(prompts))
    assert not played.played, "prompts are not played"
    decode = [(slot, length, 1) for slot, length in zip(slots, lengths, strict=False)]
    close(played.step(decode), eager.step(decode))
    assert len(played.played) == 1
    played.played.clear()
    for found, expected in zip(played.caches(), eager.caches(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_what_a_step_left_behind_does_not_reach_a_smaller_one(runs: tuple[Run, Run]) -> None:
    """A padded size after a full one: the rows that are padding now had sequences before."""
    played, eager = runs
    full = [(slot, 20, 1) for slot in (-1, 0, 1, 1, 2)]
    for run in runs:
        run.fill_caches(0.5)
        run.step(full)
    for fewer in ([(-1, 21, 1), (0, 21, 1), (1, 21, 1)], [(-1, 22, 1)]):
        close(played.step(fewer), eager.step(fewer))
    for found, expected in zip(played.caches(), eager.caches(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_steps_with_trained_tokens_are_not_played(runs: tuple[Run, Run]) -> None:
    """They are computed, with the rows of the adapter: token 5 is the first of the first sequence."""
    tables = TokenTables(TokenTable((5, 9)), TokenTable((3, 7, 100), 2), 5)
    tokens = TrainedTokens(tables, torch.randn(5, 64, generator=torch.Generator().manual_seed(3)))
    for run in runs:
        slots = run.runner.lora_slots
        assert slots is not None
        generator = torch.Generator().manual_seed(1)
        slots.write(0, random_image(slots.layout, 4, generator, torch.float32, tokens=tokens))
    decode = [(-1, 0, 1), (0, 0, 1), (1, 0, 1)]
    played, eager = runs
    played.played.clear()
    found = played.step(decode)
    close(found, eager.step(decode))
    assert not played.played
    for run in runs:
        run.fill_slots()
    without = eager.step(decode)
    assert (found[1] - without[1])[[3, 7, 100]].abs().min() > 1e-3
    close(found[[0, 2]], without[[0, 2]])
    assert played.step(decode).shape == without.shape and played.played, "the slot has another adapter"
    played.played.clear()


def test_what_is_no_decode_step_is_not_played() -> None:
    run = Run(played=True, slots=False)
    run.step([(-1, 0, 3), (-1, 0, 2)])
    run.step([(-1, 3, 1), (-1, 2, 2)])
    run.step([(-1, 4, 1), (-1, 4, 1)], unasked=(0, 1))
    run.step([(-1, 1, 1)] * (MOST + 1))
    assert not run.played
    run.step([(-1, 5, 1), (-1, 5, 1)])
    assert len(run.played) == 1


MIXED = {
    "prompts": ([(-1, 0, 9), (0, 0, 3), (1, 0, 7)], ()),
    "beside decodes": ([(-1, 8, 1), (0, 12, 1), (0, 0, 8), (1, 9, 6), (1, 5, 1)], (3,)),
    "that scale and shift": ([(-1, 0, 2), (0, 3, 5), (2, 4, 9), (2, 7, 1)], (1,)),
    "base alone": ([(-1, 7, 1), (-1, 0, 11)], ()),
    "full": ([(-1, 0, 12), (0, 0, 11), (2, 3, 1)], ()),
}
"""Sequences, and which of them ask for no token."""


@pytest.fixture(scope="module")
def mixed() -> tuple[Run, Run]:
    return Run(played=True, mixed=(24,)), Run(played=False)


@pytest.mark.parametrize("case", MIXED)
def test_played_mixed_steps_are_those_of_the_eager_model(mixed: tuple[Run, Run], case: str) -> None:
    """Also after other steps, whose rows and tiles are padding now."""
    (played, eager), (sequences, unasked) = mixed, MIXED[case]
    for run in mixed:
        run.fill_caches(0.5)
    found = played.step(sequences, unasked=unasked)
    close(found, eager.step(sequences, unasked=unasked))
    assert len(found) == len(sequences) - len(unasked) and len(played.played) == 1
    played.played.clear()
    for ours, theirs in zip(played.caches(), eager.caches(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_mixed_steps_of_other_sizes_are_not_played(mixed: tuple[Run, Run]) -> None:
    played, eager = mixed
    for step in ([(-1, 0, 25)], [(-1, 0, 2)] * (MOST + 1)):
        close(played.step(step), eager.step(step))
    played.step([(-1, 0, 3), (0, 0, 3)], unasked=(0, 1))
    assert not played.played


class Logged(Group):
    """A rank that is alone with a part of the model, and notes what it would exchange."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard)
        self.log: list[tuple[object, ...]] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.log.append(("sum", x.shape, x.dtype))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        self.log.append(("gather", x.shape, x.dtype))
        return torch.cat([x] * self.shard.size, -1)


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_ranks_exchange_the_same_in_the_same_order(fully_sharded: bool) -> None:
    """Or they would wait for each other for ever. Which adapter scales may differ from rank to rank."""
    logs = []
    for rank in range(2):
        group = Logged(Shard(rank, 2, fully_sharded))
        run = Run(played=True, mixed=(24,), affine=rank, group=group)
        for sequences in (
            [(-1, 0, 9), (0, 0, 30)],
            [(-1, 9, 1), (0, 30, 1)],
            [(0, 31, 1), (1, 0, 5)],
            [(1, 5, 1)],
        ):
            group.log.append(("step", len(run.played)))
            run.step(sequences)
        assert len(run.played) == 3 and len(group.log) > 20
        logs.append(group.log)
    assert logs[0] == logs[1]
