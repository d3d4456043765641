"""Reads traces of requests, row by row, whatever their length. A file's content shows its form:

- CSV with the columns ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``: the Azure LLM inference traces
  of 2023-11-16, code and conversation, published under CC-BY (Patel et al., "Splitwise: Efficient Generative
  LLM Inference Using Phase Splitting", ISCA 2024).
- JSON lines with the fields of :class:`JsonRow`, as ``--record`` writes them.
- JSON lines with the fields of :class:`MooncakeRow`: traces that say which prompts begin alike (Qin et al.,
  "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving", FAST 2025).

Rows must be in order of time. Every error is a ConfigError that names the file and the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from aioengine.errors import ConfigError
from aioengine.lab.workload.lengths import MAX_TOKENS

CSV_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
MAX_LINE = 2**20
"""Bytes; no row is longer, so a file of another kind is not read into memory as one line."""

_SECOND = 10**9
_FRACTION = re.compile(r"(?:\.(\d{1,9}))?(?:Z|\+00:?00)?")
Time = Annotated[float, Meta(ge=0, le=1e11)]
Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Output = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
"""0, of a request that ended before its first token, is read as 1."""
Name = Annotated[str, Meta(min_length=1)]


class TraceRow(NamedTuple):
    """A request of a trace; None and UNSET: the trace does not say."""

    time: int
    """Nanoseconds from any origin."""
    prompt_tokens: int
    output_tokens: int
    adapter: str | UnsetType | None = UNSET
    tenant: str | None = None
    priority: int | None = None
    deadline: float | None = None
    max_tokens: int | None = None
    expected_tokens: int | None = None
    prefix: tuple[int, ...] = ()
    """Beginning of the prompt, in the form of ``Arrival.prefix``."""


class JsonRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A line of a JSONL trace. What a row says wins over what a workload would draw."""

    time: Time
    """Seconds from any origin; only differences matter. Read to the microsecond."""
    prompt_tokens: Tokens
    output_tokens: Output
    adapter: Name | UnsetType | None = UNSET
    """null is the base model; a row without it is given an adapter."""
    tenant: Name | None = None
    priority: int | None = None
    deadline: Annotated[float, Meta(gt=0)] | None = None
    """Seconds from arrival."""
    max_tokens: Tokens | None = None
    expected_tokens: Tokens | None = None

    def row(self) -> TraceRow:
        time, prompt, output, *more = msgspec.structs.astuple(self)
        return TraceRow(round(time * 1e6) * 1000, prompt, max(output, 1), *more)


class MooncakeRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of a Mooncake trace."""

    timestamp: Annotated[float, Meta(ge=0, le=1e14)]
    """Milliseconds from any origin."""
    input_length: Tokens
    output_length: Output
    hash_ids: tuple[Annotated[int, Meta(ge=0, lt=2**32)], ...] = ()
    """A number for each 512 tokens of the prompt: equal for equal beginnings."""

    def row(self) -> TraceRow:
        time = round(self.timestamp * 1e3) * 1000
        return TraceRow(time, self.input_length, max(self.output_length, 1), prefix=self.hash_ids)


class AzureRow(msgspec.Struct):
    """A line of an Azure trace, exact to the nanosecond."""

    time: str = msgspec.field(name="TIMESTAMP")
    prompt: Tokens = msgspec.field(name="ContextTokens")
    output: Output = msgspec.field(name="GeneratedTokens")

    def row(self) -> TraceRow:
        fraction = _FRACTION.fullmatch(self.time, 19)
        try:
            since = datetime.fromisoformat(self.time[:19]) - datetime.min
        except ValueError as error:
            raise ConfigError(
                f"TIMESTAMP={self.time!r}: must be a time such as 2023-11-16 18:17:03.9799600 ({error})"
            ) from error
        if fraction is None:
            raise ConfigError(
                f"TIMESTAMP={self.time!r}: {self.time[19:]!r} is not a fraction of a second in UTC"
            )
        time = since // timedelta(seconds=1) * _SECOND + int((fraction[1] or "").ljust(9, "0"))
        return TraceRow(time, self.prompt, max(self.output, 1))


class TraceSummary(NamedTuple):
    """Facts that one reading of a trace finds out. Times are in nanoseconds."""

    rows: int
    first: int
    last: int
    adapters: tuple[str, ...]
    """Adapters that its rows name, in alphabetical order."""


def read_trace(path: str | Path) -> Iterator[TraceRow]:
    """Yield the rows, checked one at a time. Raises ConfigError."""
    last = parse = None
    line = 0
    try:
        with open(path, "rb") as file:
            while raw := file.readline(MAX_LINE):
                line += 1
                if len(raw) == MAX_LINE:
                    raise ConfigError(f"has more than {MAX_LINE} bytes")
                raw = raw.removeprefix(b"\xef\xbb\xbf").strip()
                if not raw:
                    continue
                if parse is None:
                    parse = _parser(raw)
                    if not raw.startswith(b"{"):
                        continue  # the CSV's header
                row = parse(raw)
                if last is not None and row.time < last:
                    raise ConfigError(
                        "is earlier than the line before it; rows must be in order of time: sort the file"
                    )
                last = row.time
                yield row
    except OSError as error:
        raise ConfigError(f"trace {path}: cannot be read: {error.strerror}") from error
    except (ConfigError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        text = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ConfigError(f"trace {path}, line {line}: {text}") from error
    if last is None:
        raise ConfigError(f"trace {path}: has no rows; it needs lines of JSON, or CSV with {CSV_HEADER}")


def scan_trace(
    path: str | Path,
    *,
    limit: int | None = None,
    seconds: float | None = None,
    note: Callable[[TraceRow], object] = lambda row: None,
) -> TraceSummary:
    """Read it once, up to ``limit`` rows or the first row ``seconds`` after its start; ``note`` is called
    with each. Raises ConfigError."""
    rows = first = last = 0
    names: set[str] = set()
    for row in read_trace(path):
        first = first if rows else row.time
        if seconds is not None and row.time - first > seconds * _SECOND:
            break
        rows += 1
        last = row.time
        note(row)
        if isinstance(row.adapter, str):
            names.add(row.adapter)
        if rows == limit:
            break
    return TraceSummary(rows, first, last, tuple(sorted(names)))


def _parser(first: bytes) -> Callable[[bytes], TraceRow]:
    """Return what parses the lines of a trace with this first line."""
    if first.startswith(b"{"):
        of_json = MooncakeRow if b'"input_length"' in first else JsonRow
        decode = msgspec.json.Decoder[JsonRow | MooncakeRow](of_json).decode
        return lambda raw: decode(raw).row()
    header = first.decode()
    names = [name.strip() for name in header.split(",")]
    if not {*AzureRow.__struct_encode_fields__} <= {*names}:
        shown = header if len(header) <= 80 else f"{header[:80]}..."
        raise ConfigError(
            f"{shown!r} is neither the header {CSV_HEADER} nor a JSON object; a trace is CSV or JSON lines"
        )

    def parse(raw: bytes) -> TraceRow:
        fields = [text.strip() for text in raw.decode().split(",")]
        if len(fields) != len(names):
            raise ConfigError(f"has {len(fields)} fields; there must be {len(names)}, as in the header")
        return msgspec.convert(dict(zip(names, fields, strict=True)), AzureRow, strict=False).row()

    return parse
