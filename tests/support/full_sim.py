"""FullSim: the harness of policies, with all that the core's own tests need of a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from aioengine.core import CoreLimits
from aioengine.core.state import AdapterEntry, Owner, Request
from aioengine.info import mix_name
from aioengine.request import SamplingParams
from aioengine.schedulers import SchedulerPolicy
from aioengine.step import LoadedAdapter, MixFiles, Sampled, SequenceWork, StepBatch, StepResult
from aioengine.testing import LIMITS, Sim, next_token


class Memory(Protocol):
    """Stands in for a device's memory, and checks that nobody reads what is not there."""

    def execute(self, batch: StepBatch, slots: list[AdapterEntry | None]) -> None: ...


class NoFiles:
    """The files of a mix, which are not read."""

    nbytes = 0
    files = MixFiles(())

    def share(self) -> NoFiles:
        return self

    def release(self) -> None:
        pass


class Free:
    """A constraint that allows every token; the device of :class:`FullSim` forces some of them."""

    def allowed(self, output: Sequence[int]) -> bytes:
        return b"\xff" * 32


class FullSim(Sim):
    """A core with mixes and scales, drafts, constraints, and steps that a device takes at once
    (``repeats``). ``memory`` makes a stand-in for the device's memory."""

    def __init__(
        self,
        limits: CoreLimits = LIMITS,
        policy: SchedulerPolicy | None = None,
        next_token: Callable[[list[int]], int] = next_token,
        *,
        strict: bool = True,
        memory: Callable[[CoreLimits], Memory] | None = None,
        repeats: bool = False,
    ) -> None:
        super().__init__(limits, policy, next_token, strict=strict, repeats=repeats)
        self.parts: dict[str, tuple[str, ...]] = {}
        """The adapters of a mix, by its name."""
        self.unscalable: set[str] = set()
        """Adapters that are read of such a kind that a step cannot scale them."""
        self.contents: dict[str, int] = {}
        """How often an adapter's files have changed in place, by name."""
        self._make_memory = memory
        self.memory = None if memory is None else memory(limits)
        self._read: list[AdapterEntry | None] = []
        """What the slots held when the batch was made."""

    def mix(self, *names: str, weight: float = 0.5, tenant: str | None = None) -> str:
        """Return the name of the mix of these adapters' current versions, made for a tenant."""
        residency = self.core.residency
        parts = [residency.current[name] for name in names]
        name = mix_name((f"{entry.label}@{entry.version}", weight) for entry in parts)
        if name not in residency.current:
            self.parts[name] = names
            known = residency.names.of(name)
            entry = known.declare("mix:" + name, files=NoFiles(), number=len(self.parts))
            self.sizes[name] = sum(self.sizes.get(part, 1000) for part in names)
            residency.set_size(entry, self.sizes[name], self.sizes[name])
            known.replace(entry, self.now)
        residency.current[name].owner = Owner(tenant)
        return name

    def add(
        self,
        adapter: str | None = None,
        *,
        max_tokens: int = 4,
        constrained: bool = False,
        logprobs: int | None = None,
        **options: Any,
    ) -> Request:
        constraint = Free() if constrained else None
        params = SamplingParams(max_tokens=max_tokens, constraint=constraint, logprobs=logprobs)
        return super().add(adapter, params=params, **options)

    def schedule(self) -> StepBatch | None:
        batch = super().schedule()
        self._read = [slot.entry for slot in self.core.slots.slots]
        return batch

    def finish_step(self, seconds: float = 0.01, *, steps: int = 1) -> None:
        """End the step in flight. With ``repeats``, up to ``steps`` follow it as far as its batch allows."""
        assert self.batch is not None
        if self.memory is not None:
            self.memory.execute(self.batch, self._read)
        self._steps = steps
        super().finish_step(seconds)

    def result(self, batch: StepBatch, seconds: float) -> StepResult:
        rows = [self.sample(work) if work.sample else [] for work in batch.sequences]
        ends = [self.now]
        most = min(self._steps, batch.steps)
        while len(ends) < most and self.now < batch.until and not self._ends(batch, rows):
            for work, row in zip(batch.sequences, rows, strict=True):
                history = [*work.history, *(one.token for one in row)]
                row += self.sample(dataclasses.replace(work, history=history))
            self.now += seconds
            ends.append(self.now)
        return StepResult.of(rows)._replace(seconds=[seconds] * len(ends), ends=ends)

    def _ends(self, batch: StepBatch, rows: list[list[Sampled]]) -> bool:
        """Whether one of the sequences has got a token that ends it."""
        eos = self.core.limits.eos_token_ids
        pairs = zip(batch.sequences, rows, strict=True)
        return any(row and row[-1].token in (*eos, *work.params.stop_token_ids) for work, row in pairs)

    def sample(self, work: SequenceWork) -> list[Sampled]:
        """Return the next tokens of a sequence: one, and one for each of its draft that was right."""
        history = list(work.history)
        found = [Sampled(self.choose(work, history))]
        for proposed in work.draft:
            if proposed != found[-1].token:
                break
            history.append(proposed)
            found.append(Sampled(self.choose(work, history)))
        if work.params.constraint is not None:
            forced: list[int] = []
            history.append(found[-1].token)
            for _ in range(self.forced_after(history)):
                forced.append(self.choose(work, [*history, *forced]))
            found[-1] = found[-1]._replace(forced=tuple(forced))
        return found

    def choose(self, work: SequenceWork, history: list[int]) -> int:
        """Return a sequence's token after ``history``, its tokens up to there."""
        return self.next_token(history)

    def forced_after(self, history: list[int]) -> int:
        """Return how many tokens are forced after these."""
        return sum(history) * 7 % 11

    def loaded(self, entry: AdapterEntry) -> LoadedAdapter:
        name, found = entry.label, super().loaded(entry)
        digest = found.digest + "'" * self.contents.get(name, 0)
        return found._replace(digest=digest, scalable=name not in self.unscalable)

    def lose_device(self) -> None:
        if self._make_memory is not None:
            self.memory = self._make_memory(self.core.limits)
        super().lose_device()
