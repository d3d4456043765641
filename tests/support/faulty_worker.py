"""A worker process for tests: the real one, with a model and a CPU cache that go wrong when asked to.

An adapter "hang" takes a minute to read, and so does one "hang-1", on rank 1 alone; "fail-1", "memory-1" and
"place-1" fail there, the last when it is put into a slot; "hang-end-1" and "fail-end-1" do so when the ranks
have told each other what they must. A step over the tokens ``BAD`` raises, or what a GPU raises as
``AIOENGINE_TEST_FAULT`` says: "memory", "illegal", "lost". ``AIOENGINE_TEST_START`` is a file: while it
exists, the model is not built.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from aioengine.errors import AdapterLoadError
from aioengine.executors.parts import Parts, build_parts
from aioengine.executors.process import worker
from aioengine.step import StepBatch, StepResult

BAD = [254, 7, 254]


class Store:
    def __init__(self, store: Any, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._names: dict[Any, tuple[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def begin(self, name: str, path: str, progress: Any, files: Any) -> Any:
        if name == "hang" or name == f"hang-{self._rank}":
            time.sleep(60)
        if name == f"fail-{self._rank}":
            raise AdapterLoadError("a rank's disk is broken", name=name, path=path)
        if name == f"memory-{self._rank}":
            raise MemoryError
        draft = self._store.begin(name, path, progress, files)
        self._names[draft] = name, path
        return draft

    def finish(self, draft: Any) -> Any:
        name, path = self._names.pop(draft)
        if name == f"hang-end-{self._rank}":
            time.sleep(60)
        if name == f"fail-end-{self._rank}":
            raise AdapterLoadError("a rank's norms are broken", name=name, path=path)
        image = self._store.finish(draft)
        if name == f"place-{self._rank}":
            image = dataclasses.replace(image, shape=dataclasses.replace(image.shape, layout=None))
        return image


class Runner:
    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, batch: StepBatch) -> StepResult:
        if any(list(work.tokens) == BAD for work in batch.sequences):
            fail_as(os.environ.get("AIOENGINE_TEST_FAULT"))
        result: StepResult = self._runner.execute(batch)
        return result


def fail_as(fault: str | None) -> None:
    import torch

    match fault:
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        case "illegal":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "lost":
            raise RuntimeError("CUDA error: no CUDA-capable device is detected")
    raise ArithmeticError("this token cannot be computed")


def build_faulty_parts(config: Any, planned: Any, group: Any) -> Any:
    held = os.environ.get("AIOENGINE_TEST_START")
    while held is not None and Path(held).exists():
        time.sleep(0.01)
    parts = build_parts(config, planned, group)
    return Parts(Runner(parts.runner), Store(parts.store, group.shard.rank))  # type: ignore[arg-type]


if __name__ == "__main__":
    worker.build_parts = build_faulty_parts
    worker.main()
