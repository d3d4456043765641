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

from collections.abc import Callable
from typing import Any, TypeVar

from aioengine import events
from aioengine.core import CopyMove, Core, CoreLimits, DropMove, LoadMove, StopMove
from aioengine.core.state import AdapterEntry, Request
from aioengine.errors import AdapterLoadError, EngineDead
from aioengine.request import RequestOptions, SamplingParams
from aioengine.schedulers import SchedulerPolicy
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.step import LoadedAdapter, Sampled, StepBatch, StepResult

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


def next_token(history: list[int]) -> int:
    """A stand-in for the model: depends on everything before it, and never is the end of sequence."""
    return 2 + (sum(history) * 31 + len(history)) % 200


class Sim:
    """A core and what happens to it. ``now`` moves only by what the test asks for.

    Args:
        limits: Sizes of the core; small ones by default.
        policy: The scheduling policy; None: fcfs.
        next_token: The model: takes prompt and output so far, and returns the next token.
        strict: Whether a policy that raises fails the test. If not, the core's safe policy decides in its
            place, as in an engine.
        repeats: Whether a batch may be for several steps; see :class:`~aioengine.step.StepBatch`.
    """

    def __init__(
        self,
        limits: CoreLimits = LIMITS,
        policy: SchedulerPolicy | None = None,
        next_token: Callable[[list[int]], int] = next_token,
        *,
        strict: bool = True,
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
        self.events: list[events.Event] = []
        self.intervals: tuple[events.TokenInterval, ...] = ()
        """Of the last step."""
        self.ended: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}
        """Reasons and errors with which requests ended."""

    def register(self, name: str) -> AdapterEntry:
        """Make an adapter known, which is on disk. A name that is known gets a new version."""
        return self.core.residency.names.of(name).register(f"/adapters/{name}", self.now)

    def add(
        self,
        adapter: str | None = None,
        *,
        prompt: list[int] | None = None,
        max_tokens: int = 4,
        deadline: float | None = None,
        scale: float = 1.0,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Request:
        """Add a request. ``options`` are fields of ``RequestOptions``: tenant, priority, ..."""
        number = self.count + 1
        request = self.core.add_request(
            f"r{number}",
            prompt or [10 + number % 7, 20, 30],
            params or SamplingParams(max_tokens=max_tokens),
            RequestOptions(**options),
            self.now,
            adapter=None if adapter is None else self.core.residency.current[adapter],
            scale=scale,
            deadline=deadline,
        )
        self.count = number
        return request

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
        return self.batch

    def finish_step(self, seconds: float = 0.01) -> None:
        """Give the core the tokens of the step in flight, which ends now."""
        batch, self.batch = self.batch, None
        assert batch is not None
        result = self.result(batch, seconds)
        self.intervals = self.core.step_finished(batch, result, self.now)[0]
        self.take_events()

    def result(self, batch: StepBatch, seconds: float) -> StepResult:
        """Return what a step computes: a token for each sequence that is due one."""
        rows = [[Sampled(self.next_token(list(w.history)))] if w.sample else [] for w in batch.sequences]
        return StepResult.of(rows, seconds)

    def loaded(self, entry: AdapterEntry) -> LoadedAdapter:
        """Return what a read of an adapter finds."""
        name = entry.label
        rank, nbytes = self.ranks.get(name, 8), self.sizes.get(name, 1000)
        return LoadedAdapter(rank, nbytes, nbytes, f"{name}-{entry.version}", 0.1)

    def finish_load(self, index: int = 0, *, fail: bool = False) -> None:
        """End a read of those under way."""
        entry = self.loads.pop(index)
        if fail:
            error = AdapterLoadError("the disk is broken", name=entry.label, path=entry.path)
            self.core.adapter_load_failed(entry, self.now, error, "io")
        else:
            self.on_cpu.add(entry.uid)
            self.core.adapter_loaded(entry, self.now, self.loaded(entry))
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
