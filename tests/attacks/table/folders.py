"""Attacks by the content of an adapter's folder."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
import time

from attacks.table.target import CONFIG, WEIGHTS, Target, filled, statuses


async def patterns(target: Target) -> str:
    target.adapter("pattern", target_modules="(([a-z._0-9]+)*)*!")
    return await target.load("pattern")


async def many_dimensions(target: Target, count: int = 40_000, size: int = 2**63 - 1) -> str:
    header = {"a": {"dtype": "F32", "shape": [size] * count, "data_offsets": [0, 0]}}
    data = json.dumps(header).encode()
    name = f"dimensions{count}"
    (target.adapter(name) / WEIGHTS).write_bytes(struct.pack("<Q", len(data)) + data)
    return await target.load(name)


async def many_empty_dimensions(target: Target) -> str:
    return await many_dimensions(target, 2_000_001, 0)


async def longer_than_its_header(target: Target) -> str:
    await target.load(target.adapter("known").name)
    os.truncate(target.adapter("longer") / WEIGHTS, 2**33)
    return await target.load("longer")


async def half_a_file(target: Target) -> str:
    path = target.adapter("half") / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)
    return await target.load("half")


async def large_config(target: Target) -> str:
    (target.adapter("config") / CONFIG).write_bytes(filled('{"runtime_config": [', "[]", "]}", 4_000_000))
    return await target.load("config")


async def pipe(target: Target) -> str:
    """Swap the file with a pipe, again and again, while it is loaded."""
    folder = target.adapter("pipe")
    os.mkfifo(folder / "pipe")
    shutil.copy(folder / WEIGHTS, folder / "file")
    ended = False

    def swap() -> None:
        while not ended:
            os.link(folder / "file", folder / "next")
            os.rename(folder / "next", folder / WEIGHTS)
            os.link(folder / "pipe", folder / "next")
            os.rename(folder / "next", folder / WEIGHTS)

    swapping = asyncio.create_task(asyncio.to_thread(swap))
    began = time.monotonic()
    found = [await target.ask(model="pipe") for _ in range(5)]
    ended = True
    await swapping
    return f"{statuses(found)} in {time.monotonic() - began:.1f} s"
