"""The workload that a :class:`~aioengine.lab.workload.spec.WorkloadSpec` describes, drawn as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, repeat

from msgspec import UNSET

from aioengine.checks import check_value
from aioengine.lab.workload import traces
from aioengine.lab.workload.arrivals import parse_arrivals
from aioengine.lab.workload.conversations import Conversation, Conversations
from aioengine.lab.workload.lengths import (
    draw_shape,
    parse_deadline,
    parse_lengths,
    parse_ranks,
    parse_targets,
    parse_view,
    shares,
)
from aioengine.lab.workload.popularity import parse_popularity
from aioengine.lab.workload.random_streams import Weighted, stream
from aioengine.lab.workload.requests import Arrival, Workload
from aioengine.lab.workload.sessions import Sessions, parse_sessions, parse_shared
from aioengine.lab.workload.spec import MAX_PRIORITY, WorkloadSpec

_DEFAULT_LENGTHS = "uniform:8..512"
_NANO, _MICRO = 1e9, 1e6


class OfferedWorkload(Workload):
    """The workload of ``spec`` for ``seed``: the same on every machine. With ``longest``, prompts are cut,
    and then outputs, until they fit into that many tokens.

    A trace is read once before, so that errors in it are found first. Raises ConfigError, with file and line.
    """

    def __init__(self, spec: WorkloadSpec, seed: int, *, longest: int | None = None) -> None:
        check_value("seed", seed, int)
        self.spec = spec
        self.seed = seed
        self.concurrency, self.think = spec.concurrency, spec.think
        self.objective = None
        if spec.slo is not None and parse_targets("slo", spec.slo) is None:
            self.objective = parse_deadline("slo", spec.slo)
        self._longest = longest
        self._lengths = [
            (name, None if text is None else parse_lengths(name, text))
            for name in ("prompt_tokens", "output_tokens")
            for text in [getattr(spec, name) or (_DEFAULT_LENGTHS if spec.trace is None else None)]
        ]
        self._trace: traces.TraceSummary | None = None
        self._conversations = Conversations()
        if spec.trace is not None:
            seconds = None if spec.seconds is None else spec.seconds * spec.scale
            note = self._conversations.add
            self._trace = traces.scan_trace(spec.trace, limit=spec.limit, seconds=seconds, note=note)
        self._names = adapter_names(spec.adapters)
        ranks = parse_ranks("ranks", spec.ranks)
        names = dict.fromkeys([*self._names, *(self._trace.adapters if self._trace else ())])
        self.adapters = tuple(draw_shape(name, ranks, seed) for name in names)

    def __iter__(self) -> Iterator[Arrival]:
        spec = self.spec
        chosen = _Choices(spec, self.seed, self._names)
        view, views = parse_view("lengths", spec.lengths), stream(self.seed, "predictions")
        deadlines = None if spec.deadline is None else parse_deadline("deadline", spec.deadline)
        whose: tuple[str | None, str | None, int] = (None, None, 0)
        for time, row, turn in islice(self._requests(), spec.limit):
            if spec.seconds is not None and time > spec.seconds:
                return
            conversation = self._conversations.of(row.prefix) if row.prefix else None
            if turn is None or turn.first:
                whose = chosen.draw(time, row, conversation)
            adapter, tenant, priority = whose
            prompt = min(row.prompt_tokens, spec.max_prompt or row.prompt_tokens)
            output, most, expected = view.tell(
                min(row.output_tokens, spec.max_output or row.output_tokens), views
            )
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
            request = Arrival(time, adapter, prompt, output, prefix=row.prefix) if turn is None else turn
            yield request._replace(
                time=time,
                adapter=adapter,
                prompt_tokens=prompt,
                output_tokens=output,
                max_tokens=most,
                expected_tokens=expected,
                tenant=tenant,
                priority=priority,
                deadline=deadline,
                conversation=conversation,
            )

    def _requests(self) -> Iterator[tuple[float, traces.TraceRow, Arrival | None]]:
        """Yield requests whose missing fields are not drawn yet, each with None or with its session."""
        spec = self.spec
        if spec.sessions is None and spec.shared_prefix is None:
            for time, row in self._rows():
                yield time, row, None
            return
        sessions = Sessions(parse_sessions(spec.sessions), parse_shared(spec.shared_prefix), self.seed)
        rng = stream(self.seed, "lengths in sessions")

        def more_lengths() -> tuple[int, int]:
            """Draw the lengths of a question and an answer after the first, as those are drawn."""
            prompt, output = (1 if draw is None else draw(rng) for _, draw in self._lengths)
            return prompt, output

        for time, row in self._rows():
            for turn in sessions.draw((row.prompt_tokens, row.output_tokens), more_lengths):
                own = row._replace(prompt_tokens=turn.prompt_tokens, output_tokens=turn.output_tokens)
                yield time, own, turn

    def _rows(self) -> Iterator[tuple[float, traces.TraceRow]]:
        """Yield times in seconds with rows, without end if only ``limit`` and ``seconds`` end the
        workload."""
        (_, prompts), (_, outputs) = self._lengths
        prompt_rng, output_rng = (stream(self.seed, name) for name, _ in self._lengths)
        for time, row in self._timed():
            if prompts is not None:
                row = row._replace(prompt_tokens=prompts(prompt_rng))
            if outputs is not None:
                row = row._replace(output_tokens=outputs(output_rng))
            yield time, row

    def _timed(self) -> Iterator[tuple[float, traces.TraceRow]]:
        """Yield the rows of the trace, from time 0 on, or rows at the times of the arrival process."""
        spec = self.spec
        if self._trace is not None and spec.trace is not None:
            for row in traces.read_trace(spec.trace):
                yield (row.time - self._trace.first) / _NANO / spec.scale, row
            return
        times: Iterator[int] = repeat(0)  # a closed loop does not use times
        if spec.arrivals is not None:
            process = parse_arrivals("arrivals", spec.arrivals)
            times = process.times(stream(self.seed, "arrivals"), spec.scale)
        for time in times:
            yield time / _MICRO, traces.TraceRow(time, 1, 1)


class _Choices:
    """Draws adapter, tenant and priority. Fields that a row has are drawn, too, and dropped, so that they do
    not change the draws of other rows."""

    def __init__(self, spec: WorkloadSpec, seed: int, adapters: list[str]) -> None:
        self._adapters = adapters
        self._tenants = tenant_names(spec.tenants)
        self._shares = Weighted(spec.tenant_weights()) if spec.tenants else None
        popularity = parse_popularity("popularity", spec.popularity)
        self._choose = popularity.chooser(len(adapters), seed) if adapters else None
        self._base_share = spec.base_share
        self._kept: dict[Conversation, str | None] = {}
        self._priorities = shares("priority", spec.priority or "0", low=-MAX_PRIORITY, high=MAX_PRIORITY)
        self._base_rng, self._tenant_rng, self._priority_rng = (
            stream(seed, aspect) for aspect in ("base model", "tenants", "priorities")
        )

    def draw(
        self, time: float, row: traces.TraceRow, conversation: Conversation | None
    ) -> tuple[str | None, str | None, int]:
        """Adapter, tenant and priority. A conversation keeps the adapter of its first request."""
        tenant = row.tenant
        if self._shares is not None:
            drawn = self._tenants[self._shares.draw(self._tenant_rng)]
            tenant = drawn if tenant is None else tenant
        adapter: str | None = None
        if self._choose is not None:
            adapter = self._adapters[self._choose(time)]
            if self._base_rng.random() < self._base_share:
                adapter = None
            if conversation is not None:
                adapter = self._kept.setdefault(conversation, adapter)
        priority = self._priorities(self._priority_rng)
        return (
            adapter if row.adapter is UNSET else row.adapter,
            tenant,
            priority if row.priority is None else row.priority,
        )


def adapter_names(count: int) -> list[str]:
    """Return "adapter-000", "adapter-001", ..., which sort in this order."""
    width = max(3, len(str(count - 1)))
    return [f"adapter-{index:0{width}}" for index in range(count)]


def tenant_names(count: int) -> list[str]:
    return [f"tenant-{index:0{len(str(count - 1))}}" for index in range(count)]
