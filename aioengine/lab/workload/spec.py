"""A workload as plain values, checked when it is made: :class:`WorkloadSpec`, from a file or from flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from aioengine.checks import Share, check_fields, from_plain, read_json, read_toml
from aioengine.errors import ConfigError
from aioengine.lab.workload.arrivals import parse_arrivals
from aioengine.lab.workload.forms import normalised, parse_number, parse_shares
from aioengine.lab.workload.lengths import (
    MAX_TOKENS,
    parse_deadline,
    parse_lengths,
    parse_ranks,
    parse_targets,
    parse_view,
)
from aioengine.lab.workload.popularity import Popularity, Zipf, parse_popularity
from aioengine.lab.workload.sessions import parse_sessions, parse_shared

MAX_PRIORITY = 2**31
Text = Annotated[str, Meta(min_length=1, extra={"is": "text that is not empty"})]
Lengths = Annotated[int | str, Meta(extra={"is": "a whole number, or text"})]
Due = Annotated[float | str, Meta(extra={"is": "seconds, text, or None"})]


class WorkloadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a workload depends on but the seed.

    Requests come from a trace, or from an arrival process. What they lack is drawn, each aspect from random
    numbers of its own, so that changing one leaves the others as they are. What a row of a trace says of
    itself wins.

    Raises :class:`~aioengine.errors.ConfigError` on construction; files are looked at when it is opened.
    """

    trace: Text | None = None
    """A file: CSV as the Azure LLM inference traces, or JSON lines; see
    :mod:`aioengine.lab.workload.traces`."""
    arrivals: Text | None = None
    """"poisson:rate=2", "gamma:rate=2,cv=4", "onoff:rate=2,on=10,off=30" (2 a second in bursts of 10 s, on
    average, 30 s apart) or "diurnal:rate=2,period=86400,depth=0.8"; rates in requests a second."""
    seconds: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """Time after which no request comes. With ``arrivals`` and without ``limit`` it must be given."""
    limit: Annotated[int, Meta(ge=1, le=10**12)] | None = None
    """Maximum number of requests."""
    scale: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    """Multiplies the rate: a trace's times are divided by it. The lengths of bursts and days stay."""

    adapters: Annotated[int, Meta(ge=0, le=10**6)] = 0
    """Number of adapters to spread over trace requests that name none; 0: those are for the base model."""
    sessions: Text | None = None
    """Each arrival begins a session of several requests: "chat:turns=5,think=10" (5 turns on average, each 10
    s after the answer before, also on average); with "branch=4" every turn is four requests at once that
    begin alike. With ``arrivals`` or ``concurrency`` only."""
    shared_prefix: Text | None = None
    """"tokens:1024,groups=8,alpha=1": prompts begin with 1024 tokens more, which are the same in a group (of
    8, drawn by Zipf's law). With ``arrivals`` or ``concurrency`` only."""
    concurrency: Annotated[int, Meta(ge=1, le=10**6)] | None = None
    """A closed loop: the number of callers. Each sends its next request when the one before has ended. Then
    ``arrivals`` need not be given, and times do not count."""
    think: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Seconds, in a closed loop, from a request's, or session's, end to the caller's next one."""

    popularity: Text = "uniform"
    """uniform, zipf:1.0, power:0.5 or shift:1.0. "power" is S-LoRA's: 1 is uniform, less is more skewed.
    "shift:alpha=1.0,every=60": Zipf, with ranks dealt anew every 60 s, on average."""
    base_share: Share = 0.0
    """Share (0 to 1) of the requests without an adapter in the trace that are for the base model."""
    tenants: Annotated[int, Meta(ge=0, le=10**6)] = 0
    """Number of tenants to spread over trace requests that name none; 0: they have no tenant."""
    tenant_shares: Text = "uniform"
    """"uniform", "zipf:1.0", or a weight for each: "3,1,1"."""
    priority: Text | None = None
    """Whole numbers with their shares: "0:0.9,5:0.1". None: 0 for all."""

    ranks: Lengths = 16
    """Ranks of the adapters: 16, or "8:0.5,16:0.3,64:0.2" with shares."""
    prompt_tokens: Lengths | None = None
    """128, "uniform:8..512", "lognormal:median=200,sigma=0.8" (with min= and max= that it is clipped to).
    None: as in the trace if there is one, else "uniform:8..512", as in S-LoRA."""
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
    slo: Due | None = None
    """When a request should have ended, in the same form; or "ttft=2,tpot=0.05": its first token within 2 s,
    and 0.05 s for each token after that, on average. It is measured (``slo`` in the summary) and not
    enforced. None: requests are measured by their ``deadline``."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_end()
        parse_sessions(self.sessions)
        parse_shared(self.shared_prefix)
        parse_popularity("popularity", self.popularity)
        self.tenant_weights()
        parse_ranks("ranks", self.ranks)
        parse_view("lengths", self.lengths)
        parsers: dict[str, Callable[[str, Any], object]] = {
            "arrivals": parse_arrivals,
            "priority": partial(parse_shares, low=-MAX_PRIORITY, high=MAX_PRIORITY),
            "prompt_tokens": parse_lengths,
            "output_tokens": parse_lengths,
            "deadline": parse_deadline,
            "slo": parse_targets,
        }
        for field, parse in parsers.items():
            if (value := getattr(self, field)) is not None:
                parse(field, value)

    def _check_end(self) -> None:
        """Check that there are requests, and that they end."""
        sources = self.trace is not None, self.arrivals is not None
        if all(sources):
            raise ConfigError(f"arrivals={self.arrivals!r}: the requests are those of trace; leave one out")
        if not any((*sources, self.concurrency)):
            raise ConfigError(
                "no requests: give trace (a path), arrivals (such as 'poisson:rate=2') or concurrency"
            )
        if self.trace is not None:
            for field in ("sessions", "shared_prefix"):
                if (given := getattr(self, field)) is not None:
                    raise ConfigError(f"{field}={given!r}: give arrivals or concurrency with it, not trace")
        elif self.limit is None and (self.seconds is None or self.arrivals is None):
            raise ConfigError("the requests never end; give limit, or seconds with arrivals")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "workload") -> Self:
        """From plain data, as ``msgspec.to_builtins`` gives it. Raises ConfigError, which begins with
        ``source``; unknown fields are refused by name."""
        return from_plain(cls, values, source)

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


def read_workload(path: str | Path) -> WorkloadSpec:
    """Return the workload that a file describes.

    ``.toml`` and ``.json`` hold the fields of :class:`WorkloadSpec`, at the top or in a table ``workload``
    (so an experiment.json will do); a trace that they name is looked for beside the file first. Anything else
    is a trace.

    Raises ConfigError, which begins with the path, if it cannot be read or a field is wrong.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        if not path.exists():
            raise ConfigError(f"workload {path}: there is no such file")
        if not path.is_file():
            raise ConfigError(f"workload {path}: is not a regular file, which can be read several times")
        return WorkloadSpec(trace=str(path))
    values = read_toml(path) if path.suffix == ".toml" else read_json(path)
    for key in ("comparison", "experiment", "workload"):
        inner = values.get(key)
        if isinstance(inner, Mapping):
            values = dict(inner)
    trace = values.get("trace")
    if isinstance(trace, str) and not Path(trace).is_absolute() and (path.parent / trace).is_file():
        values["trace"] = str(path.parent / trace)
    return WorkloadSpec.from_dict(values, source=f"workload {path}")
