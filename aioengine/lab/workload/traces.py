"""Traces: files of requests, read row by row and never held.

Five formats, told apart by their content, and each may be gzip:

- CSV with the columns ``TIMESTAMP,ContextTokens,GeneratedTokens``, as the Azure LLM inference traces have
  them (Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024; code
  and conversation traces of 2023-11-16, published under CC-BY).
- JSON lines with the fields of :class:`JsonRow`, as ``--record`` writes them.
- JSON lines with the fields of :class:`MooncakeRow`, as the Mooncake traces have them (Qin et al.,
  "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving", FAST 2025): they say which
  prompts begin alike.

- CSV with the columns ``Timestamp``, ``Request tokens`` and ``Response tokens`` among others, as BurstGPT has
  them (Wang et al., "BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving Systems", 2024);
  timestamps are seconds.
- A JSON array of ``{"conversations": [{"from": "human", "value": ...}, ...]}``, as ShareGPT has them: lengths
  without times, a row for each question with its answer. Four characters count as a token.

Rows must be in order of time. Every error is a ConfigError that names the file and the line.
"""

from __future__ import annotations

import gzip
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import msgspec
from msgspec import UNSET, UnsetType

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.lab.workload.distributions import MAX_TOKENS

S = TypeVar("S", bound=msgspec.Struct)
CSV_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
BURST_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
MAX_LINE = 2**20
"""Bytes; no row is longer, so a file of another kind is not read into memory as one line."""

_SECOND = 10**9
_GZIP = b"\x1f\x8b"


class JsonRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A line of a JSONL trace. What a row says wins over what a workload would draw."""

    time: float
    """Seconds from any origin; only differences matter. Read to the microsecond."""
    prompt_tokens: int
    output_tokens: int
    """0, for a request that ended before its first token, is read as 1."""
    adapter: str | UnsetType | None = UNSET
    """null is the base model; a row without it is given an adapter."""
    tenant: str | None = None
    priority: int | None = None
    deadline: float | None = None
    """Seconds from arrival."""
    max_tokens: int | None = None
    expected_tokens: int | None = None


class MooncakeRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of a Mooncake trace."""

    timestamp: float
    """Milliseconds from any origin."""
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    """A number for each 512 tokens of the prompt: equal for equal beginnings."""


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


class TraceSummary(NamedTuple):
    """Facts that one reading of a trace finds out. Times are in nanoseconds."""

    rows: int
    first: int
    last: int
    adapters: tuple[str, ...]
    """Adapters that its rows name, in alphabetical order."""

    @property
    def period(self) -> int:
        """Time after which it can be repeated: its length plus one mean gap."""
        length = self.last - self.first
        return length + length // (self.rows - 1) if length else _SECOND


def read_trace(path: str | Path) -> Iterator[TraceRow]:
    """Yield the rows, checked one at a time. Raises ConfigError."""
    last = None
    line = 0
    try:
        with _open(path) as file:
            parse = None
            if file.read(1) == b"[":
                yield from _share_gpt(b"[" + file.read())
                return
            file.seek(0)
            while raw := file.readline(MAX_LINE):
                line += 1
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if len(raw) == MAX_LINE:
                    raise ConfigError(f"has more than {MAX_LINE} bytes")
                if not (raw := raw.strip()):
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
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(f"trace {path}: cannot be read: {reason}") from error
    except ConfigError as error:
        raise ConfigError(f"trace {path}, line {line}: {error}") from error
    if last is None:
        raise ConfigError(f"trace {path}: has no rows; it needs lines of JSON, or CSV with {CSV_HEADER}")


def scan_trace(path: str | Path, *, limit: int | None = None, seconds: float | None = None) -> TraceSummary:
    """Read it once, up to ``limit`` rows or the first row ``seconds`` after its start. Raises ConfigError."""
    rows = first = last = 0
    names: set[str] = set()
    for row in read_trace(path):
        first = first if rows else row.time
        if seconds is not None and row.time - first > seconds * _SECOND:
            break
        rows += 1
        last = row.time
        if isinstance(row.adapter, str):
            names.add(row.adapter)
        if rows == limit:
            break
    return TraceSummary(rows, first, last, tuple(sorted(names)))


class LengthSample:
    """Pairs of prompt and output lengths: all of a trace, or an even sample of ``size`` of them (Vitter,
    1985, algorithm R), so that memory does not grow with it."""

    def __init__(self, path: str | Path, rng: Random, *, size: int = 2**16) -> None:
        self._pairs = array("Q")
        for index, row in enumerate(read_trace(path)):
            pair = row.prompt_tokens << 32 | row.output_tokens
            if index < size:
                self._pairs.append(pair)
            elif (place := int(rng.random() * (index + 1))) < size:
                self._pairs[place] = pair

    def draw(self, rng: Random) -> tuple[int, int]:
        """Prompt tokens and output tokens of one request."""
        pair = self._pairs[int(rng.random() * len(self._pairs))]
        return pair >> 32, pair & 0xFFFF_FFFF


def _open(path: str | Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
    return cast("BinaryIO", gzip.open(path, "rb")) if packed else open(path, "rb")


Parser = Callable[[bytes], TraceRow]


def _row(time: int, prompt: tuple[str, int], output: tuple[str, int], **more: Any) -> TraceRow:
    """Return a row whose numbers of tokens, given with their names, are in range."""
    _check(*prompt, low=1)
    _check(*output, low=0)
    return TraceRow(time, prompt[1], max(output[1], 1), **more)


class _CsvParser:
    """Parser of the Azure traces, exact to the nanosecond. Rows of one second share the work of parsing
    it."""

    _WHEN = re.compile(r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)")
    _FRACTION = re.compile(r"(?:\.(\d{1,9}))?(?:Z|\+00:?00)?")

    def __init__(self) -> None:
        self._second = ""
        self._base = 0
        """Time of ``_second``, in nanoseconds."""

    def __call__(self, raw: bytes) -> TraceRow:
        fields = _text(raw).split(",")
        if len(fields) != 3:
            raise ConfigError(f"has {len(fields)} fields; there must be 3: {CSV_HEADER}")
        prompt, output = (
            (name, _tokens(name, text))
            for name, text in zip(CSV_HEADER.split(",")[1:], fields[1:], strict=True)
        )
        return _row(self._time(fields[0].strip()), prompt, output)

    def _time(self, text: str) -> int:
        if text[:19] != self._second:
            self._base = self._parse_second(text)
            self._second = text[:19]
        fraction = self._FRACTION.fullmatch(text, 19)
        if fraction is None:
            raise ConfigError(f"TIMESTAMP={text!r}: {text[19:]!r} is not a fraction of a second in UTC")
        return self._base + int((fraction[1] or "").ljust(9, "0"))

    def _parse_second(self, text: str) -> int:
        when = self._WHEN.match(text)
        try:
            if when is None:
                raise ValueError("it does not look like one")
            since = datetime(*map(int, when.groups())) - datetime.min  # type: ignore[arg-type] # six numbers
        except ValueError as error:
            raise ConfigError(
                f"TIMESTAMP={text!r}: must be a time such as 2023-11-16 18:17:03.9799600 ({error})"
            ) from error
        return (since.days * 86_400 + since.seconds) * _SECOND


def _json_parser() -> Parser:
    decoder = msgspec.json.Decoder(JsonRow)

    def parse(raw: bytes) -> TraceRow:
        row = _decoded(decoder, raw, JsonRow)
        if not 0 <= row.time <= 1e11:
            raise ConfigError(f"time={row.time!r}: must be seconds >= 0")
        for name in ("max_tokens", "expected_tokens"):
            if (tokens := getattr(row, name)) is not None:
                _check(name, tokens, low=1)
        if row.deadline is not None and not row.deadline > 0:
            raise ConfigError(f"deadline={row.deadline!r}: must be more than 0 seconds")
        if row.adapter == "" or row.tenant == "":
            raise ConfigError("adapter and tenant must not be empty text; null is none")
        more = msgspec.structs.asdict(row)
        time, prompt, output = (more.pop(name) for name in ("time", "prompt_tokens", "output_tokens"))
        return _row(round(time * 1e6) * 1000, ("prompt_tokens", prompt), ("output_tokens", output), **more)

    return parse


def _mooncake_parser() -> Parser:
    decoder = msgspec.json.Decoder(MooncakeRow)

    def parse(raw: bytes) -> TraceRow:
        row = _decoded(decoder, raw, MooncakeRow)
        if not 0 <= row.timestamp <= 1e14:
            raise ConfigError(f"timestamp={row.timestamp!r}: must be milliseconds >= 0")
        if not all(0 <= number < 2**32 for number in row.hash_ids):
            raise ConfigError("hash_ids: must be whole numbers from 0 to 2**32 - 1")
        lengths = ("input_length", row.input_length), ("output_length", row.output_length)
        return _row(round(row.timestamp * 1e3) * 1000, *lengths, prefix=row.hash_ids)

    return parse


def _burst_parser(names: list[str]) -> Parser:
    """Return a parser of BurstGPT's columns, wherever they are."""
    places = [names.index(name) for name in BURST_COLUMNS]

    def parse(raw: bytes) -> TraceRow:
        fields = _text(raw).split(",")
        if len(fields) != len(names):
            raise ConfigError(f"has {len(fields)} fields; the header has {len(names)}")
        when, *lengths = (fields[place].strip() for place in places)
        try:
            seconds = float(when)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= 1e11:
            raise ConfigError(f"Timestamp={when!r}: must be seconds >= 0")
        prompt, output = (
            (name, _tokens(name, text)) for name, text in zip(BURST_COLUMNS[1:], lengths, strict=True)
        )
        return _row(round(seconds * 1e6) * 1000, prompt, output)

    return parse


class _Said(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Said]


def has_times(path: str | Path) -> bool:
    """Whether its rows have times; ShareGPT's have none. Raises ConfigError if it cannot be read."""
    try:
        with _open(path) as file:
            return file.read(1) != b"["
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"trace {path}: cannot be read: {error}") from error


def _share_gpt(data: bytes) -> Iterator[TraceRow]:
    """Yield a row for each question that is followed by an answer."""
    try:
        found = msgspec.json.decode(data, type=list[_Conversation])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no array of conversations as ShareGPT's: {error}") from error
    askers = ("human", "user")
    rows = 0
    for conversation in found:
        for question, answer in pairwise(conversation.conversations):
            if question.speaker in askers and answer.speaker not in (*askers, "system"):
                lengths = [min(-(-len(said.value) // 4), MAX_TOKENS) for said in (question, answer)]
                rows += 1
                yield TraceRow(0, max(lengths[0], 1), max(lengths[1], 1))
    if not rows:
        raise ConfigError("has no question that is followed by an answer")


def _parser(first: bytes) -> Parser:
    if first.startswith(b"{"):
        return _mooncake_parser() if b'"input_length"' in first else _json_parser()
    header = _text(first)
    names = [name.strip() for name in header.split(",")]
    if set(BURST_COLUMNS) <= set(names):
        return _burst_parser(names)
    if names != CSV_HEADER.split(","):
        shown = header if len(header) <= 80 else f"{header[:80]}..."
        raise ConfigError(
            f"{shown!r} is neither the header {CSV_HEADER} nor a JSON object; a trace is CSV or JSON lines"
        )
    return _CsvParser()


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text") from error


def _tokens(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: must be a whole number") from None


def _check(name: str, tokens: int, *, low: int) -> None:
    if not low <= tokens <= MAX_TOKENS:
        raise ConfigError(f"{name}={tokens}: must be in {low}..{MAX_TOKENS}")


def _decoded(decoder: msgspec.json.Decoder[S], raw: bytes, row: type[msgspec.Struct]) -> S:
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        text = str(error)
        if "unknown field" in text:
            name, fields = text.split("`")[1], row.__struct_fields__
            text = f"unknown field {name!r}{nearest(name, fields)}; there are {', '.join(fields)}"
        raise ConfigError(text) from error
