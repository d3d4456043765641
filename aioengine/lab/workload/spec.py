"""A workload as plain values, checked when it is made: :class:`WorkloadSpec`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from aioengine.checks import Share, check_fields, from_plain
from aioengine.errors import ConfigError
from aioengine.lab.workload.arrivals import parse_arrivals
from aioengine.lab.workload.forms import normalised, parse_number, parse_shares
from aioengine.lab.workload.lengths import (
    MAX_TOKENS,
    parse_deadline,
    parse_lengths,
    parse_ranks,
    parse_sizes,
    parse_view,
)
from aioengine.lab.workload.popularity import Popularity, Tenant, Zipf, parse_bursts, parse_popularity
from aioengine.lab.workload.sessions import parse_sessions, parse_shared

MAX_PRIORITY = 2**31
Text = Annotated[str, Meta(min_length=1, extra={"is": "text that is not empty"})]
Lengths = Annotated[int | str, Meta(extra={"is": "a whole number, or text"})]
Due = Annotated[float | str, Meta(extra={"is": "seconds, text, or None"})]


class WorkloadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a workload depends on but the seed.

    Requests come from a trace, or from an arrival process, or with the times of a process and the lengths
    of a trace. What they lack is drawn, each aspect from random numbers of its own, so that changing one
    leaves the others as they are. What a row of a trace says of itself wins.

    Raises :class:`~aioengine.errors.ConfigError` on construction; files are looked at when it is opened.
    """

    trace: Text | None = None
    """A file: CSV as the Azure LLM inference traces, or JSON lines, or either as gzip;
    see :mod:`aioengine.lab.workload.traces`."""
    arrivals: Text | None = None
    """"poisson:rate=2", "gamma:rate=2,cv=4", "onoff:rate=2,on=10,off=30" (2 a second in bursts of 10 s, on
    average, 30 s apart) or "diurnal:rate=2,period=86400,depth=0.8"; rates in requests a second."""
    seconds: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """Time after which no request comes. With ``arrivals`` and without ``limit`` it must be given."""
    limit: Annotated[int, Meta(ge=1, le=10**12)] | None = None
    """Maximum number of requests."""
    scale: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    """Multiplies the rate: a trace's times are divided by it. The lengths of bursts and days stay."""
    repeat: bool = False
    """Whether a trace begins again at its end, one mean gap later, up to ``limit`` or ``seconds``."""

    adapters: Annotated[int, Meta(ge=0, le=10**6)] = 0
    """Number of adapters to spread over trace requests that name none; 0: those are for the base model."""
    sessions: Text | None = None
    """Each arrival begins a session of several requests: "chat:turns=5,think=10" (5 turns on average, each 10
    s after the answer before, also on average) or "agents:turns=5,think=0.5,branch=4" (every turn is four
    requests at once that begin alike); see :mod:`aioengine.lab.workload.sessions`. With ``arrivals`` or
    ``concurrency`` only."""
    shared_prefix: Text | None = None
    """"tokens:1024,groups=8,alpha=1": prompts begin with 1024 tokens more, which are the same in a group (of
    8, drawn by Zipf's law). With ``arrivals`` or ``concurrency`` only."""
    concurrency: Annotated[int, Meta(ge=1, le=10**6)] | None = None
    """A closed loop: the number of callers. Each sends its next request when the one before has ended. Then
    ``arrivals`` need not be given, and times do not count."""
    think: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Seconds, in a closed loop, from a request's, or session's, end to the caller's next one."""

    popularity: Text = "uniform"
    """uniform, zipf:1.0, power:0.5, shift:1.0 or tenant. "power" is S-LoRA's: 1 is uniform, less is more
    skewed. "shift:alpha=1.0,every=60": Zipf, with ranks dealt anew every 60 s, on average. "tenant": every
    tenant has its own adapters; "tenant:1.0": with a Zipf distribution among them."""
    base_share: Share = 0.0
    """Share (0 to 1) of the requests without an adapter in the trace that are for the base model."""
    tenants: Annotated[int, Meta(ge=0, le=10**6)] = 0
    """Number of tenants to spread over trace requests that name none; 0: they have no tenant."""
    tenant_shares: Text = "uniform"
    """"uniform", "zipf:1.0", or a weight for each: "3,1,1"."""
    tenant_bursts: Text | None = None
    """"bursts:factor=5,on=10,off=60": each tenant sends five times its share for 10 s on average, every 60
    s."""
    priority: Text | None = None
    """Whole numbers with their shares: "0:0.9,5:0.1". None: 0 for all."""

    ranks: Lengths = 16
    """Ranks of the adapters: 16, or "8:0.5,16:0.3,64:0.2" with shares."""
    adapter_bytes: Lengths | None = None
    """Size of an adapter: bytes, "64MiB", "uniform:8MiB..64MiB" or "lognormal:median=2e7,sigma=0.5". None:
    what the model's shape gives for its rank."""
    prompt_tokens: Lengths | None = None
    """128, "uniform:8..512", "lognormal:median=200,sigma=0.8" (with min= and max= that it is clipped to),
    or "trace". None: "trace" if there is one, else "uniform:8..512", as in S-LoRA."""
    output_tokens: Lengths | None = None
    """Distribution of output lengths, in the form of ``prompt_tokens``."""
    max_prompt: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    """Longer prompts are cut to this, so that a trace fits a small model."""
    max_output: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    """Longer outputs are cut to this."""
    lengths: Text = "known"
    """Information that policies get about the outputs' lengths: "known", "hidden:max=4096" (all they see is
    that ``max_tokens``), or "predicted:error=0.5" (hidden, and a prediction that is off by a lognormal
    factor)."""
    deadline: Due | None = None
    """When the engine ends a request with an error: seconds from arrival, or "proportional:0.5+0.05": 0.5 s,
    and 0.05 s for each token of output. Policies see it."""
    timeout: Due | None = None
    """Another name of ``deadline``, for use with ``slo``; give at most one of the two."""
    slo: Due | None = None
    """When a request should have ended, in the same form. It is measured (``slo`` in the summary) and not
    enforced. None: requests are measured by their ``deadline`` or ``timeout``."""

    def __post_init__(self) -> None:
        check_fields(self)
        for field, is_wrong, why in self._wrong():
            if is_wrong:
                raise ConfigError(f"{field}={getattr(self, field)!r}: {why}")
        parse_sessions(self.sessions)
        parse_shared(self.shared_prefix)
        popularity = parse_popularity("popularity", self.popularity)
        if isinstance(popularity, Tenant) and self.adapters:
            popularity.check(self.adapters, self.tenants)
        self.tenant_weights()
        parse_ranks("ranks", self.ranks)
        parse_view("lengths", self.lengths)
        parsers: dict[str, Callable[[str, Any], object]] = {
            "arrivals": parse_arrivals,
            "tenant_bursts": parse_bursts,
            "priority": partial(parse_shares, low=-MAX_PRIORITY, high=MAX_PRIORITY),
            "adapter_bytes": parse_sizes,
            "prompt_tokens": _parse_lengths,
            "output_tokens": _parse_lengths,
            "deadline": parse_deadline,
            "timeout": parse_deadline,
            "slo": parse_deadline,
        }
        for field, parse in parsers.items():
            if (value := getattr(self, field)) is not None:
                parse(field, value)

    @property
    def plays_trace(self) -> bool:
        """Whether requests are the rows of a trace; else only lengths may be taken from it."""
        drawn = self.arrivals is not None or (self.concurrency is not None and self.sessions is not None)
        return self.trace is not None and not drawn

    @property
    def draws_lengths(self) -> bool:
        """Whether no length is taken from a trace."""
        return not {None, "trace"} & {self.prompt_tokens, self.output_tokens}

    def _wrong(self) -> Iterator[tuple[str, object, str]]:
        """Yield fields with whether they are wrong, and why: there must be requests, they must end, and
        nothing may be given in vain."""
        endless = self.limit is None and self.seconds is None
        closed, timed = self.concurrency is not None, self.arrivals is not None
        if not (self.trace or timed or closed):
            raise ConfigError(
                "no requests: give trace (a path), arrivals (such as 'poisson:rate=2') or concurrency"
            )
        yield "think", self.think and not closed, "is for a closed loop; give concurrency with it"
        for field in ("sessions", "shared_prefix"):
            given = getattr(self, field)
            yield field, given and not (timed or closed), "give arrivals or concurrency with it"
        for field in ("prompt_tokens", "output_tokens"):
            in_vain = getattr(self, field) == "trace" and self.trace is None
            yield field, in_vain, "there is no trace; give one, or a distribution"
        why = "nothing is taken from it, with arrivals, prompt_tokens and output_tokens given; leave one out"
        yield "trace", self.trace and timed and self.draws_lengths, why
        why = f"with concurrency={self.concurrency} the loop never ends; give limit"
        yield "limit", closed and self.trace is None and self.limit is None, why
        yield "repeat", self.repeat and timed, "arrivals never end; leave it out"
        yield "repeat", self.repeat and endless, "say when to end, by limit or seconds"
        yield "arrivals", timed and endless, "they never end; give limit or seconds"
        yield "tenant_bursts", self.tenant_bursts and not self.tenants, "there are no tenants; give tenants"
        both = self.deadline is not None and self.timeout is not None
        yield "timeout", both, f"with deadline={self.deadline!r}: give one of the two"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "workload") -> Self:
        """From plain data, as ``msgspec.to_builtins`` gives it. Raises ConfigError, which begins with
        ``source``; unknown fields are refused by name."""
        return from_plain(cls, values, source)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with defaults filled in."""
        values = msgspec.to_builtins(self)
        assert isinstance(values, dict)
        return values

    def tenant_weights(self) -> list[float]:
        """Return each tenant's share of the requests; they add up to 1."""
        text = self.tenant_shares
        if text[0].isalpha():
            popularity = parse_popularity("tenant_shares", text)
            if type(popularity) not in (Popularity, Zipf):
                raise ConfigError(
                    f"tenant_shares={text!r}: write uniform, zipf:ALPHA or weights such as 3,1,1"
                )
            return popularity.shares(self.tenants)
        weights = [parse_number("tenant_shares", text, part) for part in text.split(",")]
        if len(weights) != self.tenants:
            raise ConfigError(
                f"tenant_shares={text!r}: has {len(weights)} weights for tenants={self.tenants}"
            )
        return normalised("tenant_shares", text, weights)


def _parse_lengths(field: str, value: int | str) -> object:
    return value == "trace" or parse_lengths(field, value)
