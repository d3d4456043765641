"""The order of steps and of writes into slots on a device, seen with streams that only note what they are
told: no GPU is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny_models import build_model

from aioengine.model.files.hf_config import read_spec
from aioengine.model.runner import ModelRunner
from aioengine.model.slots.copy import Copy, StreamCopier
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

CPU = torch.device("cpu")


class Clock:
    """How far each stream is known to be behind which work, as vector clocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default = Stream("steps")
        self.current = self.default
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream("copies"))
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    @contextlib.contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.done = 0
        self.seen: dict[str, int] = {}
        self.waits = 0

    def work(self) -> None:
        self.done += 1

    def wait_stream(self, other: Stream) -> None:
        self.seen[other.name] = other.done

    def wait_event(self, event: Event) -> None:
        self.seen |= event.at

    def synchronize(self) -> None:
        self.waits += 1


class Event:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at: dict[str, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        on = stream or self._clock.current
        self.at = {on.name: on.done}

    def synchronize(self) -> None:
        return


def copies() -> list[Copy]:
    return [Copy(torch.zeros(4), torch.ones(4))]


def test_a_write_comes_after_the_steps_that_may_read_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    copier = StreamCopier(CPU)
    stream = copier._stream
    copier.write(copies())  # before any step there is nothing to wait for
    assert stream.seen == {"steps": 0}
    for step in (1, 2):
        copier.before_step()
        clock.current.work()
        copier.after_step()
        copier.write(copies())
        assert stream.seen["steps"] == step


def test_a_step_comes_after_the_writes_that_have_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    copier = StreamCopier(CPU)
    copier._stream.work()
    copier.write(copies())
    copier.before_step()
    assert clock.default.seen["copies"] == 1


def test_a_step_that_samples_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tmp_path, "llama")
    runner = ModelRunner(
        read_spec(model),
        model,
        dtype=torch.float32,
        device="cpu",
        num_blocks=8,
        block_size=16,
        kernels="torch",
    )
    clock = Clock(monkeypatch)
    monkeypatch.setattr(runner, "device", torch.device("cuda"))
    for sample, waits in ((False, 1), (True, 1)):  # tokens that come back have been waited for
        ids = list(range(5, 25))
        work = SequenceWork("r", -1, ids, 0, [0, 1], sample, SamplingParams(), 0, ids, 20)
        with monkeypatch.context() as patch:
            patch.setattr(runner, "_prepare", _on_cpu(runner))
            runner.execute(StepBatch(0, [work], ()))
        assert clock.default.waits == waits


def _on_cpu(runner: ModelRunner):  # type: ignore[no-untyped-def]
    prepare = ModelRunner._prepare

    def prepared(batch: StepBatch):  # type: ignore[no-untyped-def]
        device, runner.device = runner.device, CPU
        try:
            return prepare(runner, batch)
        finally:
            runner.device = device

    return prepared
