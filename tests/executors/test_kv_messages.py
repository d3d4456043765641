"""Blocks in messages to and from worker processes."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.config import EngineConfig
from aioengine.errors import EngineDead
from aioengine.executors.process.device import ProcessDevice
from aioengine.executors.process.kv_parts import MESSAGE_BYTES, portions
from aioengine.executors.process.workers import Workers


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 200), st.integers(0, 3 * MESSAGE_BYTES), st.integers(1, 8))
def test_all_ranks_messages_together_are_bounded(count: int, block_bytes: int, ranks: int) -> None:
    blocks = list(range(count))
    parts = [blocks[part] for part in portions(blocks, block_bytes, ranks)]
    assert [block for part in parts for block in part] == blocks
    for part in parts:
        assert len(part) == 1 or len(part) * block_bytes * ranks <= MESSAGE_BYTES


class Starting(Workers):
    """Workers whose start does not end."""

    async def start(self, num_blocks: int | None = None) -> tuple[msgspec.Raw, int]:
        await asyncio.get_running_loop().create_future()
        raise AssertionError


async def test_workers_that_are_being_started_are_not_asked_for_blocks() -> None:
    device = ProcessDevice(EngineConfig(model="any", executor="process"), Starting, vocab=1)
    start = asyncio.create_task(device.start())
    await asyncio.sleep(0)
    with pytest.raises(EngineDead, match="being started"):
        await device.read_kv([0])
    with pytest.raises(EngineDead, match="being started"):
        await device.write_kv([0], {})
    start.cancel()
    await asyncio.wait([start])
    await device.close()
