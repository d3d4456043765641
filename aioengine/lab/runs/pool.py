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
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.lab.runs.experiment import Experiment


class Task(NamedTuple):
    experiment: Experiment
    out: Path


class Outcome(NamedTuple):
    """How a task has ended: its run's summary, or why there is none."""

    summary: dict[str, Any] | None
    error: str | None = None


def run_all(
    tasks: Sequence[Task],
    jobs: int,
    *,
    ended: Callable[[Task, Outcome], None] = lambda task, outcome: None,
) -> list[Outcome]:
    """Run the tasks, at most ``jobs`` at a time, and tell of each that has ended. Returns their outcomes, in
    the order of the tasks. However this ends, no process is left behind, not even if this process is killed.
    """
    upcoming, outcomes = deque(enumerate(tasks)), dict[int, Outcome]()
    idle: list[tuple[Connection, SpawnProcess]] = []
    busy: dict[Connection, tuple[SpawnProcess, int]] = {}
    try:
        while upcoming or busy:
            while upcoming and len(busy) < jobs:
                pipe, process = idle.pop() if idle else _start_worker()
                index, task = upcoming.popleft()
                busy[pipe] = process, index
                pipe.send(task)
            ready = wait(busy)
            for pipe in [pipe for pipe in busy if pipe in ready]:
                process, index = busy.pop(pipe)
                try:
                    outcomes[index] = pipe.recv()
                    idle.append((pipe, process))
                except (EOFError, ConnectionError):
                    process.join()
                    outcomes[index] = Outcome(None, _how_it_ended(process.exitcode or 0))
                ended(tasks[index], outcomes[index])
    finally:
        for process in [*(process for process, _ in busy.values()), *(process for _, process in idle)]:
            process.kill()
            process.join()
    return [outcomes[index] for index in range(len(tasks))]


def _start_worker() -> tuple[Connection, SpawnProcess]:
    # Not forked: the parent may hold threads of polars and of the progress bar.
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return pipe, process


def _how_it_ended(code: int) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its process {how} (out of memory?)"


def _work(pipe: Connection) -> None:
    """Run tasks in a worker's process, until its parent ends it or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from aioengine.lab.runs.simulate import run

    with suppress(EOFError, ConnectionError):
        while True:
            task: Task = pipe.recv()
            try:
                outcome = Outcome(run(task.experiment, task.out).summary)
            except Exception as error:
                outcome = Outcome(None, f"{type(error).__name__}: {' '.join(str(error).split())}")
            pipe.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
