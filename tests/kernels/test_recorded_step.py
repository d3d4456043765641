"""The metadata of decode steps at fixed addresses: what it holds, and that it stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from aioengine.kernels import LoRABatch, Span
from aioengine.kernels.triton.plan import TilePlan, cut
from aioengine.kernels.triton.query_tiles import QueryTiles
from aioengine.kernels.triton.recorded_step import RecordedShape, RecordedStep, most_tiles
from aioengine.model.cuda.working_memory import sizes


def make(size: int, group: int = 4) -> RecordedStep:
    return RecordedStep(size, RecordedShape(64, 4, 16, 3, 8, group, 64, 64), "cpu", decodes=True)


def fill(step: RecordedStep, ids: list[int], at: list[int], tables: Sequence[Any], lora: LoRABatch) -> None:
    spans = [Span(i, 1, start) for i, start in enumerate(at)]
    assert step.fill(ids, spans, tables, range(len(ids)), lora, lora)


def test_sizes_of_steps() -> None:
    assert sizes(1) == [1]
    assert sizes(6) == [1, 2, 4, 6]
    assert sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert sizes(150) == [*sizes(64), 72, 80, 88, 96, 104, 112, 120, 128, 144, 150]
    for most in (1, 7, 64, 100, 256, 1000):
        found = sizes(most)
        assert found == sorted(set(found)) and found[-1] == most
        assert all(b - a <= max(8, b // 8) for a, b in pairwise(found))


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_tiles_fit_whatever_the_adapters_are(slots: int) -> None:
    for size in (1, 4, 16, 17, 40, 64):
        for used in range(1, min(slots, size) + 1):
            # The worst is one token for all but one adapter, and another short of a full tile.
            counts = [1] * (used - 1) + [size - used + 1]
            batch = LoRABatch(list(range(used)), counts, [4] * slots)
            assert len(cut(batch.segments, 16)) <= most_tiles(size, slots)
            even = [size // used + (i < size % used) for i in range(used)]
            batch = LoRABatch(list(range(used)), even, [4] * slots)
            assert len(cut(batch.segments, 16)) <= most_tiles(size, slots)


def test_a_step_is_filled_and_emptied_in_place() -> None:
    step = make(4)
    plan, tiles = step.attention, step.plans["lora"][0].derive(TilePlan)
    query = plan.derive(QueryTiles).of(4, 64)[0]
    before = [t.data_ptr() for t in (plan.positions, plan.cells, plan.tables, query.table, tiles.tiles(16))]
    lora = LoRABatch([-1, 0, 2], [1, 1, 1], [8, 0, 4], slot_affine=[False, False, True])
    fill(step, [7, 8, 9], [0, 17, 33], [[5], [3, 2], [9, 8, 7]], lora)
    assert step.token_ids.tolist() == [7, 8, 9, 0]
    assert plan.positions.tolist() == [0, 17, 33, 0]
    assert plan.cells.tolist() == [80, 33, 113, -1]
    assert plan.tables[:3].tolist() == [[5, 0, 0, 0], [3, 2, 0, 0], [9, 8, 7, 0]]
    assert query.table.tolist() == [[0, 0, 1, 0], [1, 1, 1, 17], [2, 2, 1, 33], [3, 3, 0, 0]]
    assert tiles.tiles(16).tolist() == [[0, 1, 1, 8], [2, 2, 1, 4], [0, 0, 0, 0]]
    assert tiles.affine_tiles(16).tolist() == [[2, 2, 1, 4], [0, 0, 0, 0], [0, 0, 0, 0]]
    base, plain, affine = (step.plans[kind][0] for kind in ("base", "lora", "affine"))
    assert plain.segments and not plain.affine and affine.affine and not base.segments

    fill(step, [6], [34], [[9, 8, 7]], LoRABatch([-1], [1], []))
    assert plan.cells.tolist() == [114, -1, -1, -1]
    assert plan.tables[0].tolist() == [9, 8, 7, 0]
    assert [tokens for _, _, tokens, _ in query.table.tolist()] == [1, 0, 0, 0]
    assert not tiles.tiles(16).any() and not tiles.affine_tiles(16).any()
    after = [t.data_ptr() for t in (plan.positions, plan.cells, plan.tables, query.table, tiles.tiles(16))]
    assert after == before


def test_a_table_is_written_when_it_has_changed() -> None:
    step = make(2)
    empty = LoRABatch([-1], [1], [])
    table = [1, 2]
    fill(step, [1], [30], [table], empty)
    table.append(3)  # the same list, longer
    fill(step, [1], [32], [table], empty)
    assert step.attention.tables[0].tolist() == [1, 2, 3, 0]
    fill(step, [1], [5], [[4]], empty)
    fill(step, [1], [32], [table], empty)
    assert step.attention.tables[0].tolist() == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="holds no adapter"):
        fill(step, [1], [5], [[4]], LoRABatch([1], [1], [4, 0]))
