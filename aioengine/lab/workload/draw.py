"""The workload that a :class:`~aioengine.lab.workload.spec.WorkloadSpec` describes, drawn as it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from aioengine.checks import check_value
from aioengine.errors import ConfigError
from aioengine.lab.workload import traces
from aioengine.lab.workload.arrivals import parse_arrivals
from aioengine.lab.workload.distributions import (
    Draw,
    draw_shape,
    parse_lengths,
    parse_ranks,
    parse_sizes,
    shares,
)
from aioengine.lab.workload.popularity import (
    TenantBursts,
    make_popularity,
    parse_bursts,
    parse_popularity,
)
from aioengine.lab.workload.predictions import parse_deadline, parse_view
from aioengine.lab.workload.random_streams import Weighted, stable_number, stream
from aioengine.lab.workload.requests import AdapterShape, Arrival, Objective, Workload
from aioengine.lab.workload.sessions import Sessions, Turn
from aioengine.lab.workload.spec import WorkloadSpec

_DEFAULT_LENGTHS = "uniform:8..512"
_NANO, _MICRO = 1e9, 1e6
CONVERSATIONS = 2**16
"""Maximum conversations that are remembered, those with the latest requests."""


class _Draft(NamedTuple):
    """A request whose missing fields are not drawn yet."""

    time: float
    row: traces.TraceRow


class OfferedWorkload(Workload):
    """The workload of ``spec`` for ``seed``: the same on every machine. With ``longest``, prompts are cut,
    and then outputs, until they fit into that many tokens.

    A trace is read once before, so that errors in it are found first. Raises ConfigError, with file and line.
    """

    def __init__(self, spec: WorkloadSpec, seed: int, *, longest: int | None = None) -> None:
        check_value("seed", seed, int)
        self._longest = longest
        self.spec = spec
        self.seed = seed
        self._trace: traces.TraceSummary | None = None
        self._sample: traces.LengthSample | None = None
        timed = spec.arrivals is not None or (spec.concurrency is not None and spec.sessions is not None)
        if spec.trace is not None and not timed:
            seconds = None if spec.seconds is None else spec.seconds * spec.scale
            if spec.concurrency is None and not traces.has_times(spec.trace):
                raise ConfigError(
                    f"trace {spec.trace}: has no times; give arrivals, or concurrency for a closed loop"
                )
            self._trace = traces.scan_trace(spec.trace, limit=spec.limit, seconds=seconds)
        elif spec.trace is not None and "trace" in self._length_texts():
            self._sample = traces.LengthSample(spec.trace, stream(seed, "sample of lengths"))
        self._names = numbered("adapter", spec.adapters, width=3)
        self._tenants = numbered("tenant", spec.tenants)
        self._adapters = self._draw_adapters()

    @property
    def adapters(self) -> Sequence[AdapterShape]:
        return self._adapters

    @property
    def objective(self) -> Objective | None:
        return None if self.spec.slo is None else parse_deadline("slo", self.spec.slo)

    @property
    def concurrency(self) -> int | None:
        return self.spec.concurrency

    @property
    def think(self) -> float:
        return self.spec.think

    def describe(self) -> dict[str, Any]:
        """Return the fields of the spec, and the seed."""
        cut = {} if self._longest is None else {"truncated_to": self._longest}
        return {**msgspec.to_builtins(self.spec), "seed": self.seed, **cut}

    def __iter__(self) -> Iterator[Arrival]:
        spec, seed = self.spec, self.seed
        chosen = _Choices(spec, seed, self._names, self._tenants)
        view = parse_view("lengths", spec.lengths)
        views = stream(seed, "predictions")
        limit = spec.deadline if spec.timeout is None else spec.timeout
        deadlines = None if limit is None else parse_deadline("deadline", limit)
        whose: tuple[str | None, str | None, int] = (None, None, 0)
        for time, row, turn in islice(self._requests(), spec.limit):
            if spec.seconds is not None and time > spec.seconds:
                return
            if turn is None or turn.first:
                whose = chosen.draw(time, row)
            adapter, tenant, priority = whose
            prompt, output = row.prompt_tokens, row.output_tokens
            if spec.max_prompt is not None:
                prompt = min(prompt, spec.max_prompt)
            if spec.max_output is not None:
                output = min(output, spec.max_output)
            output, most, expected = view(output, views)
            if row.max_tokens is not None:
                most = row.max_tokens
                output = min(output, most)
            if row.expected_tokens is not None:
                expected = row.expected_tokens
            deadline = row.deadline
            if deadline is None and deadlines is not None:
                deadline = deadlines(output)
            if self._longest is not None:
                output = min(output, self._longest - 1)
                prompt = min(prompt, self._longest - output)
            yield Arrival(
                time,
                adapter,
                prompt,
                output,
                most,
                expected,
                tenant,
                priority,
                deadline,
                *((row.prefix,) if turn is None else (turn.prefix, *turn[3:])),
            )

    def _requests(self) -> Iterator[tuple[float, traces.TraceRow, Turn | None]]:
        """Yield the drafts, each with None or with its session."""
        spec = self.spec
        if spec.sessions is None and spec.shared_prefix is None:
            for time, row in self._drafts():
                yield time, row, None
            return
        sessions = Sessions(spec.sessions, spec.shared_prefix, self.seed)
        lengths = self._session_lengths()
        for time, row in self._drafts():
            first = row.prompt_tokens, row.output_tokens
            for turn in sessions.draw(first, lengths):
                own = row._replace(prompt_tokens=turn.prompt_tokens, output_tokens=turn.output_tokens)
                yield time, own, turn

    def _session_lengths(self) -> Callable[[], tuple[int, int]]:
        """Draw the lengths of questions and answers after the first, as those are drawn."""
        prompts, outputs = (
            None if text == "trace" else parse_lengths("lengths", text) for text in self._length_texts()
        )
        rng = stream(self.seed, "lengths in sessions")

        def draw() -> tuple[int, int]:
            prompt, output = (1, 1) if self._sample is None else self._sample.draw(rng)
            if prompts is not None:
                prompt = prompts(rng)
            return prompt, output if outputs is None else outputs(rng)

        return draw

    def _draw_adapters(self) -> tuple[AdapterShape, ...]:
        spec = self.spec
        ranks = parse_ranks("ranks", spec.ranks)
        sizes = None if spec.adapter_bytes is None else parse_sizes("adapter_bytes", spec.adapter_bytes)
        named = () if self._trace is None else self._trace.adapters
        names = dict.fromkeys([*self._names, *named])
        return tuple(draw_shape(name, ranks, sizes, self.seed) for name in names)

    def _length_texts(self) -> tuple[int | str, int | str]:
        default = _DEFAULT_LENGTHS if self.spec.trace is None else "trace"
        prompt, output = self.spec.prompt_tokens, self.spec.output_tokens
        return default if prompt is None else prompt, default if output is None else output

    def _drafts(self) -> Iterator[_Draft]:
        """Yield requests, without end if only ``limit`` and ``seconds`` end the workload."""
        drafts = self._timed() if self._trace is None else self._traced(self._trace)
        lengths = (
            (name, None if text == "trace" else parse_lengths(name, text), stream(self.seed, name))
            for name, text in zip(("prompt_tokens", "output_tokens"), self._length_texts(), strict=True)
        )
        (_, prompts, prompt_rng), (_, outputs, output_rng) = lengths
        if prompts is None and outputs is None:
            yield from drafts
            return
        for time, row in drafts:
            if prompts is not None:
                row = row._replace(prompt_tokens=prompts(prompt_rng))
            if outputs is not None:
                row = row._replace(output_tokens=outputs(output_rng))
            yield _Draft(time, row)

    def _timed(self) -> Iterator[_Draft]:
        """Yield requests at the times of the arrival process, with lengths from the trace if there is a
        sample of it."""
        times: Iterator[int] = repeat(0)  # a closed loop does not use times
        if self.spec.arrivals is not None:
            process = parse_arrivals("arrivals", self.spec.arrivals, scale=self.spec.scale)
            times = process(stream(self.seed, "arrivals"))
        pairs = stream(self.seed, "pairs of lengths")
        for time in times:
            prompt, output = (1, 1) if self._sample is None else self._sample.draw(pairs)
            yield _Draft(time / _MICRO, traces.TraceRow(time, prompt, output))

    def _traced(self, summary: traces.TraceSummary) -> Iterator[_Draft]:
        """Yield the rows of the trace, from time 0 on; over and over again if it is to be repeated."""
        assert self.spec.trace is not None
        start = -summary.first
        while True:
            for row in traces.read_trace(self.spec.trace):
                yield _Draft((row.time + start) / _NANO / self.spec.scale, row)
            if not self.spec.repeat:
                return
            start += summary.period


class _Choices:
    """Draws adapter, tenant and priority. Fields that a row has are drawn, too, and dropped, so that they do
    not change the draws of other rows."""

    def __init__(
        self, spec: WorkloadSpec, seed: int, adapters: Sequence[str], tenants: Sequence[str]
    ) -> None:
        self._adapters = adapters
        self._tenants = tenants
        self._tenant_index = {name: index for index, name in enumerate(tenants)}
        self._tenant_table = Weighted(spec.tenant_weights()) if tenants else None
        self._bursts: TenantBursts | None = None
        if spec.tenant_bursts is not None:
            form = parse_bursts("tenant_bursts", spec.tenant_bursts)
            self._bursts = TenantBursts(spec.tenant_weights(), form, seed)
        self._popularity = None
        if adapters:
            form = parse_popularity("popularity", spec.popularity)
            self._popularity = make_popularity(form, len(adapters), spec.tenants, seed)
        self._base_share = spec.base_share
        self._conversations: dict[int, str | None] = {}
        self._priorities: Draw | None = None
        if spec.priority is not None:
            self._priorities = shares("priority", spec.priority, low=-(2**63), high=2**63)
        self._base_rng = stream(seed, "base model")
        self._tenant_rng = stream(seed, "tenants")
        self._priority_rng = stream(seed, "priorities")

    def draw(self, time: float, row: traces.TraceRow) -> tuple[str | None, str | None, int]:
        """Adapter, tenant and priority."""
        tenant, index = self._tenant(time, row)
        adapter: str | None = None
        if self._popularity is not None:
            adapter = self._adapters[self._popularity(time, index)]
            if self._base_rng.random() < self._base_share:
                adapter = None
            if row.prefix:  # prompts with the same beginning are one conversation, which keeps its adapter
                adapter = self._conversation(row.prefix[0], adapter)
        if row.adapter is not UNSET:
            adapter = row.adapter
        priority = 0 if self._priorities is None else self._priorities(self._priority_rng)
        return adapter, tenant, priority if row.priority is None else row.priority

    def _conversation(self, number: int, adapter: str | None) -> str | None:
        """Return the adapter of its first request."""
        known = self._conversations
        adapter = known.pop(number, adapter)
        known[number] = adapter
        if len(known) > CONVERSATIONS:
            del known[next(iter(known))]
        return adapter

    def _tenant(self, time: float, row: traces.TraceRow) -> tuple[str | None, int]:
        """Return a tenant's name, and the number whose adapters it has."""
        if self._tenant_table is None:
            return row.tenant, 0
        table = self._tenant_table if self._bursts is None else self._bursts.table(time)
        index = table.draw(self._tenant_rng)
        if row.tenant is None:
            return self._tenants[index], index
        known = self._tenant_index.get(row.tenant)
        return row.tenant, stable_number(row.tenant) % len(self._tenants) if known is None else known


def numbered(prefix: str, count: int, *, width: int = 1) -> list[str]:
    """Return "adapter-000", "adapter-001", ..., which sort in this order."""
    width = max(width, len(str(count - 1)))
    return [f"{prefix}-{index:0{width}}" for index in range(count)]
