"""Sim: the engine's real core in virtual time, without a model, for tests of scheduling policies.

>>> sim = Sim(policy=MyPolicy())
>>> sim.register("sql")
>>> request = sim.add("sql", max_tokens=4)
>>> sim.run()
>>> sim.ended[request.id]
'length'

Steps, reads and copies happen when the test says so: :meth:`Sim.settle` finishes what is under way and runs a
step; single methods do one thing each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from aioengine import events
from aioengine.core import CopyMove, Core, CoreLimits, DropMove, LoadMove, StopMove
from aioengine.core.state import AdapterEntry, Owner, Request
from aioengine.errors import AdapterLoadError, EngineDead
from aioengine.info import mix_name
from aioengine.request import RequestOptions, SamplingParams
from aioengine.schedulers import SchedulerPolicy
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.step import LoadedAdapter, MixFiles, Sampled, SequenceWork, StepBatch, StepResult

LIMITS = CoreLimits(
    num_slots=2,
    cpu_capacity=3,
    max_loads=2,
    num_blocks=24,
    block_size=4,
    max_num_seqs=6,
    max_num_batched_tokens=16,
    max_model_len=64,
    eos_token_ids=(1,),
)
"""Small sizes, with which most things happen soon."""
E = TypeVar("E", bound=events.Event)


class Memory(Protocol):
    """Stands in for a device's memory, and checks that nobody reads what is not there."""

    def execute(self, batch: StepBatch, slots: list[AdapterEntry | None]) -> None: ...


def next_token(history: list[int]) -> int:
    """A stand-in for the model: depends on everything before it, and never is the end of sequence."""
    return 2 + (sum(history) * 31 + len(history)) % 200


class NoFiles:
    """The files of a mix, which are not read."""

    nbytes = 0
    files = MixFiles(())

    def share(self) -> NoFiles:
        return self

    def release(self) -> None:
        pass


class Free:
    """A constraint that allows every token; the device of :class:`Sim` forces some of them."""

    def allowed(self, output: Sequence[int]) -> bytes:
        return b"\xff" * 32


class Sim:
    """A core and what happens to it. ``now`` moves only by what the test asks for.

    Args:
        limits: Sizes of the core; small ones by default.
        policy: The scheduling policy; None: fcfs.
        next_token: The model: takes prompt and output so far, and returns the next token.
        strict: Whether a policy that raises fails the test. If not, the core's safe policy decides in its
            place, as in an engine.
        memory: Makes a stand-in for the device's memory.
        repeats: Whether the device may take several steps of a batch at once.
    """

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
        self.next_token = next_token
        self.strict = strict
        self.core = Core(limits, policy or FCFS(), repeats=repeats)
        self.now = 0.0
        self.count = 0
        """Requests so far."""
        self.batch: StepBatch | None = None
        """The step in flight."""
        self.loads: list[AdapterEntry] = []
        self.copies: list[CopyMove] = []
        """Reads and copies into slots that are under way."""
        self.on_cpu: set[int] = set()
        """Versions in the CPU cache, by uid."""
        self.ranks: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        """Ranks (default 8) and bytes (default 1000) of adapters that are read, by name."""
        self.unscalable: set[str] = set()
        """Adapters that are read of such a kind that a step cannot scale them."""
        self.contents: dict[str, int] = {}
        """How often an adapter's files have changed in place, by name."""
        self.parts: dict[str, tuple[str, ...]] = {}
        """The adapters of a mix, by its name."""
        self.events: list[events.Event] = []
        self.intervals: tuple[events.TokenInterval, ...] = ()
        """Of the last step."""
        self.ended: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}
        """Reasons and errors with which requests ended."""
        self._make_memory = memory
        self.memory = None if memory is None else memory(limits)
        self._read: list[AdapterEntry | None] = []
        """What the slots held when the batch was made."""

    def register(self, name: str) -> AdapterEntry:
        """Make an adapter known, which is on disk. A name that is known gets a new version."""
        return self.core.residency.names.of(name).register(f"/adapters/{name}", self.now)

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
        prompt: list[int] | None = None,
        max_tokens: int = 4,
        deadline: float | None = None,
        constrained: bool = False,
        scale: float = 1.0,
        logprobs: int | None = None,
        **options: Any,
    ) -> Request:
        """Add a request. ``options`` are fields of ``RequestOptions``: tenant, priority, ..."""
        constraint = Free() if constrained else None
        prompt = prompt or [10 + (self.count + 1) % 7, 20, 30]
        reservation = self.core.reserve(options.get("tenant"), adapter, self.now, len(prompt))
        self.count += 1
        return self.core.add_request(
            f"r{self.count}",
            prompt,
            SamplingParams(max_tokens=max_tokens, constraint=constraint, logprobs=logprobs),
            RequestOptions(**options),
            self.now,
            adapter=None if adapter is None else self.core.residency.current[adapter],
            scale=scale,
            deadline=deadline,
            reservation=reservation,
        )

    def schedule(self) -> StepBatch | None:
        """Ask the core for the next step, which :meth:`finish_step` ends, and begin its moves."""
        assert self.batch is None
        step = self.core.schedule(self.now)
        self.batch = step.batch
        for move in step.moves:
            match move:
                case LoadMove(entry):
                    self.loads.append(entry)
                case StopMove(entry):
                    self.loads.remove(entry)
                case CopyMove(entry):
                    assert entry.uid in self.on_cpu, "a copy of what is not in CPU memory"
                    self.copies.append(move)
                case DropMove(entry):
                    self.on_cpu.remove(entry.uid)
        self.take_events()
        self._read = [slot.entry for slot in self.core.slots.slots]
        return self.batch

    def finish_step(self, seconds: float = 0.01, *, steps: int = 1) -> None:
        """Give the core the tokens of the step in flight, which ends now. With ``repeats``, up to ``steps``
        follow it as far as its batch allows, ``seconds`` each."""
        batch, self.batch = self.batch, None
        assert batch is not None
        if self.memory is not None:
            self.memory.execute(batch, self._read)
        rows = [self.sample(work) if work.sample else [] for work in batch.sequences]
        ends = [self.now]
        while len(ends) < min(steps, batch.steps) and self.now < batch.until and not self._ends(batch, rows):
            for work, row in zip(batch.sequences, rows, strict=True):
                history = [*work.history, *(one.token for one in row)]
                row += self.sample(msgspec.structs.replace(work, history=history))
            self.now += seconds
            ends.append(self.now)
        result = StepResult.of(rows)._replace(seconds=[seconds] * len(ends), ends=ends)
        self.intervals = self.core.step_finished(batch, result, self.now)[0]
        self.take_events()

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

    def finish_load(self, index: int = 0, *, fail: bool = False) -> None:
        """End a read of those under way."""
        entry = self.loads.pop(index)
        name = entry.label
        if fail:
            error = AdapterLoadError("the disk is broken", name=name, path=entry.path)
            self.core.adapter_load_failed(entry, self.now, error, "io")
        else:
            self.on_cpu.add(entry.uid)
            digest = f"{name}-{entry.version}" + "'" * self.contents.get(name, 0)
            rank, nbytes = self.ranks.get(name, 8), self.sizes.get(name, 1000)
            found = LoadedAdapter(rank, nbytes, digest, 0.1, scalable=name not in self.unscalable)
            self.core.adapter_loaded(entry, self.now, found)
        self.take_events()

    def finish_copy(self, index: int = 0, *, fail: bool = False) -> None:
        """End a copy into a slot of those under way."""
        entry = self.copies.pop(index).entry
        if fail:
            error = AdapterLoadError("out of memory", name=entry.label, path=entry.path)
            self.core.adapter_place_failed(entry, self.now, error)
        else:
            self.core.slots.placed(entry, self.now, 0.01)
        self.take_events()

    def lose_device(self) -> None:
        """Lose what ran, was loaded, or was under way."""
        self.batch = None
        self.loads.clear()
        self.copies.clear()
        self.on_cpu.clear()
        if self._make_memory is not None:
            self.memory = self._make_memory(self.core.limits)
        self.core.device_lost(self.now, EngineDead("the device is gone"))
        self.take_events()

    def take_events(self) -> None:
        """Empty the core's outbox into ``events``."""
        for event in self.core.outbox:
            if self.strict:
                assert not isinstance(event, events.PolicyFailed), event.error
            if isinstance(event, events.RequestEnded):
                assert event.request_id not in self.ended, "a request ended twice"
                self.ended[event.request_id] = event.reason
                if event.error is not None:
                    self.errors[event.request_id] = event.error
        self.events += self.core.outbox
        self.core.outbox.clear()

    def settle(self, *, step_seconds: float = 0.01, check: bool = True) -> StepBatch | None:
        """Finish all moves under way, then one whole step; ``check`` the core's invariants then."""
        while self.loads:
            self.finish_load()
        while self.copies:
            self.finish_copy()
        batch = self.schedule()
        self.now += step_seconds
        if batch is not None:
            self.finish_step()
        if check:
            self.core.check()
        return batch

    def run(self, *, steps: int = 1000, step_seconds: float = 0.01) -> int:
        """Settle until no request is left; returns the number of steps taken."""
        for step in range(steps):
            if not self.core.requests:
                return step
            self.settle(step_seconds=step_seconds)
        raise AssertionError(f"{len(self.core.requests)} requests did not end in {steps} steps")

    def of(self, kind: type[E]) -> list[E]:
        """Return the events of a kind so far."""
        return [event for event in self.events if isinstance(event, kind)]
