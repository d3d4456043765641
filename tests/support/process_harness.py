"""The worker processes of the engines in a test, and what they may not leave behind."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from aioengine.executors.process import spawn

WORKERS = {spawn.WORKER_MODULE, "support.faulty_worker"}


def worker_pids(of: int | None = None) -> list[int]:
    """The workers that run now, in the order of their start: this process's, or those of ``of``."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        try:
            if WORKERS.intersection(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def open_sockets() -> int:
    return sum(link.startswith("socket:") for link in _links())


def _links() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue


class NothingLeft:
    """Processes, sockets, shared memory and folders, compared with what was there before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._now()

    def _now(self) -> tuple[int, list[int], set[str], list[Path]]:
        shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
        return open_sockets(), worker_pids(), shared, list(self._folder.glob("aioengine-*"))

    async def check(self) -> None:
        async with asyncio.timeout(20):
            while self._now()[:2] != self._before[:2]:
                await asyncio.sleep(0.01)
        sockets, pids, shared, folders = self._now()
        assert (sockets, pids, folders) == (self._before[0], self._before[1], [])
        mine = {name for name in shared - self._before[2] if "torch" in name or "aioengine" in name}
        assert not mine


@pytest.fixture
async def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NothingLeft:
    """Temporary folders are made in one of the test's own. (On the test's loop, which has sockets too.)"""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return NothingLeft(tmp_path)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run :mod:`support.faulty_worker`."""
    monkeypatch.setattr(spawn, "WORKER_MODULE", "support.faulty_worker")
