"""The worker processes of the engines in a test, and what they may not leave behind."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import psutil
import pytest
from support import preloaded
from support.failure_harness import Held, open_files

from aioengine.executors.process import spawn

WORKERS = {spawn.WORKER_MODULE, "support.faulty_worker"}


def worker_pids(of: int | None = None) -> list[int]:
    """The workers that run now, in the order of their start: this process's, or those of ``of``."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        try:
            words = [*child.cmdline(), preloaded.module_of(child.pid)]
            if WORKERS.intersection(words) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def open_sockets() -> set[str]:
    return {link for _, link in open_files() if link.startswith("socket:")}


def shared_memory() -> set[str]:
    """What this process has in /dev/shm, and what others left there that are gone. (Torch names them so.)"""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    makers = {name: int(found[1]) for name in names if (found := re.match(r"torch_(\d+)_", name))}
    return {name for name, pid in makers.items() if pid == os.getpid() or not psutil.pid_exists(pid)}


class NothingLeft(Held):
    """Processes, sockets, shared memory and folders that were not there before; others may have gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        super().__init__()

    def now(self) -> set[object]:
        return {*open_sockets(), *worker_pids(), *shared_memory(), *self._folder.glob("aioengine-*")}


@pytest.fixture
async def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NothingLeft:
    """Temporary folders are made in one of the test's own. (On the test's loop, which has sockets too.)"""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return NothingLeft(tmp_path)


@pytest.fixture
def preloaded_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked with their imports, for tests that are not about their processes."""

    async def start(rank: int, connection: int) -> preloaded.Program:
        return preloaded.start(
            spawn.WORKER_MODULE,
            str(rank),
            preloaded.Inherited(connection),
            environment=spawn.worker_environment(),
            errors=2,
        )

    monkeypatch.setattr(spawn, "start_process", start)


@pytest.fixture
def faulty(preloaded_workers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run :mod:`support.faulty_worker`."""
    monkeypatch.setattr(spawn, "WORKER_MODULE", "support.faulty_worker")
