"""Runs in separate processes, several at a time.

If a process is killed, for example for lack of memory, only its run fails. With ``concurrent.futures`` and
``joblib`` a lost worker breaks the whole pool.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aioengine.lab.runs.experiment import Experiment

_POLL_SECONDS = 0.2
"""Seconds between two checks of whether to stop."""


class Task(NamedTuple):
    key: int
    experiment: Experiment
    out: Path


class Report(NamedTuple):
    """Report of a task: any number of "progress", then one "done" or "failed"."""

    key: int
    kind: Literal["progress", "done", "failed"]
    done: int = 0
    """Requests."""
    total: int | None = None
    summary: dict[str, Any] | None = None
    error: str | None = None


class _Worker:
    """A process, and the task that it has."""

    def __init__(self) -> None:
        # Not forked: the parent may hold threads of polars and of the progress bar.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.task: Task | None = None
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        self.task = task
        self.pipe.send(task)

    def hear(self, task: Task) -> Report:
        """Return what it reports of its task, or how it has ended."""
        try:
            found: Report = self.pipe.recv()
            return found
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            return Report(task.key, "failed", error=f"its process {how} (out of memory?)")

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def run_all(
    tasks: Iterable[Task],
    jobs: int,
    report: Callable[[Report], None],
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Run the tasks, at most ``jobs`` at a time, and report on each as it goes.

    Raises KeyboardInterrupt soon after ``stopping()`` has become true. However this ends, no process is
    left behind, not even if this process is killed.
    """
    upcoming = deque(tasks)
    workers = [_Worker() for _ in range(min(jobs, len(upcoming)))]
    try:
        for worker in workers:
            worker.give(upcoming.popleft())
        while any(worker.task is not None for worker in workers):
            ready = wait([worker.pipe for worker in workers if worker.task is not None], _POLL_SECONDS)
            if stopping():
                raise KeyboardInterrupt
            for index, worker in enumerate(workers):
                if worker.pipe not in ready or worker.task is None:
                    continue
                found = worker.hear(worker.task)
                report(found)
                if found.kind == "progress":
                    continue
                worker.task = None
                if upcoming and not worker.process.is_alive():
                    worker.end()
                    workers[index] = worker = _Worker()
                if upcoming:
                    worker.give(upcoming.popleft())
    finally:
        for worker in workers:
            worker.end()


def _work(pipe: Connection) -> None:
    """Run tasks in a worker's process, until its parent ends it or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from aioengine.lab.runs.simulate import run

    with suppress(EOFError, ConnectionError):
        while True:
            task: Task = pipe.recv()

            def progress(done: int, total: int | None, now: float, key: int = task.key) -> None:
                pipe.send(Report(key, "progress", done, total))

            try:
                found = Report(task.key, "done", summary=run(task.experiment, task.out, progress).summary)
            except Exception as error:
                text = " ".join(str(error).split())
                found = Report(task.key, "failed", error=f"{type(error).__name__}: {text}")
            pipe.send(found)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
