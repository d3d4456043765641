"""The engine under faults that are drawn by seed; and that bugs which were put in are found that way."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
from simulation.faults import FaultyDevice
from simulation.scenario import Found, run

from aioengine import events
from aioengine.core import Core, DropMove
from aioengine.core.batcher import Batcher
from aioengine.core.state import Request
from aioengine.runtime.output_stream import OutputStream
from aioengine.runtime.transfers import AdapterMoves

RUNS = int(os.environ.get("AIOENGINE_FUZZ_RUNS", "200"))  # make fuzz runs more
SEED = os.environ.get("AIOENGINE_FUZZ_SEED")
ONE_SEED = pytest.mark.skipif(SEED is not None, reason="AIOENGINE_FUZZ_SEED asks for that scenario alone")


@pytest.mark.slow
def test_faults_by_seed() -> None:
    happened: Counter[type[events.Event]] = Counter()
    for seed in range(RUNS) if SEED is None else [int(SEED)]:
        happened.update(map(type, run(seed)))
    if SEED is None and RUNS >= 200:  # none of it may quietly stop happening
        rare = {
            kind.__name__: happened[kind]
            for kind in (
                events.AdapterFailed,
                events.AdapterUnloaded,
                events.EngineRestarted,
                events.PolicyFailed,
                events.PolicyOverran,
                events.PolicyReplaced,
                events.RequestPreempted,
            )
        }
        assert min(rare.values()) >= 1, rare


@ONE_SEED
@pytest.mark.parametrize("seed", [4, 5, 8, 11])
def test_a_seed_gives_the_same_events_every_time(seed: int) -> None:
    first, second = ("\n".join(map(str, run(seed))) for _ in range(2))
    assert first == second
    assert first.count("\n") > 10


# Bugs that are put in


def forget_blocks(patch: pytest.MonkeyPatch) -> None:
    """A request's blocks are not given back when it ends with an adapter."""
    release = Batcher.release

    def leak(batcher: Batcher, request: Request) -> None:
        if request.adapter is not None:
            request.blocks = []
        release(batcher, request)

    patch.setattr(Batcher, "release", leak)


def write_two_slots(patch: pytest.MonkeyPatch) -> None:
    """The device writes an adapter to its slot, and over the next one."""
    place = FaultyDevice.place

    async def twice(device: FaultyDevice, uid: int, slot: int, offset: int) -> float:
        seconds = await place(device, uid, slot, offset)
        slots = device.memory.slots
        slots[(slot + 1) % len(slots)] = uid
        return seconds

    patch.setattr(FaultyDevice, "place", twice)


def write_over_another(patch: pytest.MonkeyPatch) -> None:
    """Where slots share a memory, every adapter is written to its beginning."""
    place = FaultyDevice.place

    async def at_the_beginning(device: FaultyDevice, uid: int, slot: int, offset: int) -> float:
        return await place(device, uid, slot, 0)

    patch.setattr(FaultyDevice, "place", at_the_beginning)


def share_prefixes_between_adapters(patch: pytest.MonkeyPatch) -> None:
    """The prefix cache takes one adapter's KV for another's."""
    patch.setattr(Request, "_cache_key", lambda request, content: b"")


def trust_failed_copies(patch: pytest.MonkeyPatch) -> None:
    """A slot is used whose copy has failed."""
    patch.setattr(
        Core, "adapter_place_failed", lambda core, entry, now, error: core.slots.placed(entry, now, 0.0)
    )


def lose_drops(patch: pytest.MonkeyPatch) -> None:
    """The CPU memory of what leaves the cache is not freed."""
    start = AdapterMoves.start
    patch.setattr(
        AdapterMoves, "start", lambda moves, move: None if isinstance(move, DropMove) else start(moves, move)
    )


def keep_errors_from_callers(patch: pytest.MonkeyPatch) -> None:
    """A request that fails leaves its caller waiting."""
    end = OutputStream.end
    patch.setattr(OutputStream, "end", lambda stream, why, error: None if error else end(stream, why, error))


def ignore_deadlines(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "expire", lambda core, now: None)


BUGS = [
    forget_blocks,
    write_two_slots,
    write_over_another,
    share_prefixes_between_adapters,
    trust_failed_copies,
    lose_drops,
    keep_errors_from_callers,
    ignore_deadlines,
]


@ONE_SEED
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.slow
def test_bugs_are_found(bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    for seed in range(200):
        told = problem_of(seed)
        if told is not None:
            assert f"AIOENGINE_FUZZ_SEED={seed} python -m pytest tests/simulation" in told
            return
    pytest.fail("200 seeds, and nothing found")


def problem_of(seed: int) -> str | None:
    try:
        run(seed)
    except Found as found:
        return str(found)
    return None
