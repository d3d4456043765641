"""Messages between an engine and its workers: msgspec structs in msgpack, each preceded by its length.

Both ends have the same version of the package, so the format is private. A message contains only new data: a
request's tokens and blocks are sent once (see ``step_delta``).
"""

from __future__ import annotations

import socket
import struct
import traceback
from asyncio import StreamReader
from typing import Any

import msgspec

from aioengine import errors
from aioengine.checks import plain
from aioengine.config import EngineConfig
from aioengine.step import AdapterSource, StepResult

_LENGTH = struct.Struct("<I")
MAX_BYTES = 2**32 - 1
"""Maximum bytes of one message."""


class _Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages."""


# To the workers


class Start(_Message, frozen=True):
    """Asks what the worker would allocate; answered with Planned."""

    number: int
    config: EngineConfig
    rank: int
    size: int
    threads: int
    """Compute threads for this rank; 0: its share of torch's default."""
    rendezvous: str
    """A file where the ranks find each other; "" for one rank."""


class Build(_Message, frozen=True):
    """Asks the worker to load the model; answered with Done."""

    number: int
    num_blocks: int
    """KV blocks, the same on all ranks."""


class Opened(msgspec.Struct, array_like=True, frozen=True):
    """A request that the workers have not seen before."""

    key: int
    """Number that stands for the request from now on."""
    request_id: str
    params: dict[str, Any]
    """The sampling parameters that are not the defaults; never the constraint."""
    constrained: bool
    seed: int
    prompt_len: int


class Work(msgspec.Struct, array_like=True, frozen=True):
    """One sequence's share of a step."""

    key: int
    slot: int
    start: int
    count: int
    """Number of tokens to compute from position ``start``."""
    sample: bool
    tokens: list[int]
    """Tokens to append to its history first."""
    kept_blocks: int
    """Number of leading blocks in its table that stay as they were."""
    blocks: list[int]
    """Blocks that follow them."""
    score: int = 0
    """Number of tokens to score, as in ``SequenceWork``."""
    draft: list[int] = []
    """Proposed tokens, to compute after its history."""
    scale: float = 1.0
    """What its adapter is multiplied by."""


class Step(_Message, frozen=True):
    """Runs a step; answered with Stepped."""

    number: int
    step: int
    ended: list[int]
    """Keys that will not be used again."""
    opened: list[Opened]
    work: list[Work]
    slot_ranks: list[int]


class Masks(_Message, frozen=True):
    """Follows a step in which a sequence with a constraint is sampled."""

    step: int
    found: dict[int, bytes]
    """Allowed tokens by index in ``work``; late ones are left out."""


class Read(_Message, frozen=True):
    """Read an adapter; answered with ReadDone or Failed, even if it was discarded meanwhile."""

    number: int
    name: str
    path: str
    files: AdapterSource | None = None
    """Files that are read in place of a folder."""


class Add(_Message, frozen=True):
    """Adds a rank's ``squares`` from byte ``begin`` on to the read ``number``. All ranks receive the same
    parts in the same order."""

    number: int
    begin: int
    squares: bytes


class Finish(_Message, frozen=True):
    """Finishes the read ``read``, to which everything has been added; answered with Done or Failed."""

    number: int
    read: int


class Keep(_Message, frozen=True):
    """Put the result of the read ``number`` into the CPU cache."""

    number: int
    uid: int


class Discard(_Message, frozen=True):
    """Forget the read ``number`` and its result."""

    number: int


class Drop(_Message, frozen=True):
    """Free an adapter's CPU memory."""

    uid: int


class Place(_Message, frozen=True):
    """Copy an adapter into a slot; answered with Done or Failed."""

    number: int
    uid: int
    slot: int
    offset: int
    """Offset in the slots' memory, in bytes."""


class Measure(_Message, frozen=True):
    """Asks what was taken of the device's memory since the plan; answered with Measured."""

    number: int


# From the workers


class Measured(_Message, frozen=True):
    number: int
    taken: int | None
    """Result of :meth:`aioengine.executors.base.Device.memory_taken` on this rank."""


class Planned(_Message, frozen=True):
    """The plan, once all ranks have found each other. ``plan`` is the memory plan in msgpack."""

    number: int
    num_blocks: int
    plan: msgspec.Raw


class Progress(_Message, frozen=True):
    """Progress of reading the model's files; see ``LoadProgress``."""

    stage: str
    done: int
    total: int


class Stepped(_Message, frozen=True):
    number: int
    result: StepResult
    """Only from rank 0 are there more than the seconds."""


class Reading(_Message, frozen=True):
    """Says from time to time that the read ``number`` goes on."""

    number: int


class ReadDone(_Message, frozen=True):
    number: int
    rank: int
    """The adapter's rank."""
    nbytes: int
    """Bytes of the share that is kept."""
    digest: str
    """Digest of the content; "" if only a rank's share was read."""
    version: str
    """Version of the files' content, known without reading it."""
    labels: int
    """Labels of its classification head."""
    invocation: tuple[int, ...]
    """The adapter is applied from these tokens on; none: to all tokens."""
    squares: bytes
    """Sums that every rank must add before the read can be finished. They have the same length on all ranks;
    empty if it is finished."""
    slot_nbytes: int
    """Bytes of the share that slots hold."""
    scalable: bool
    """Whether a step can multiply what it adds by a number."""


class Done(_Message, frozen=True):
    number: int
    seconds: float
    kernels: str = ""
    """Names of the kernels, in an answer to Build."""
    variance: str | None = None
    """Reason why a token's bits depend on its batch, in an answer to Build."""


class Failed(_Message, frozen=True):
    """The request ``number`` has failed; the worker goes on."""

    number: int
    error: WireError


class Broken(_Message, frozen=True):
    """This worker cannot go on: its start or a step has failed."""

    error: WireError


class WireError(msgspec.Struct, array_like=True, frozen=True):
    """An exception, with all fields of the package's own errors."""

    type: str
    text: str
    fields: dict[str, Any] | None = None
    """Fields of an ``AioEngineError``; None for other exceptions."""
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> WireError:
        name = type(error).__name__
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, errors.AioEngineError) and getattr(errors, name, None) is type(error):
            plain = (str, int, float, bool, type(None))
            fields = {key: value for key, value in vars(error).items() if isinstance(value, plain)}
            return cls(name, str(error), fields, trace)
        return cls(name, str(error), None, trace)

    def error(self) -> Exception:
        """Rebuild the exception: a :class:`WorkerError` if its class is not in :mod:`aioengine.errors`."""
        if self.fields is None:
            error: Exception = WorkerError(f"{self.type}: {self.text}" if self.text else self.type)
            error.add_note(f"in the worker:\n{self.trace}")
            return error
        kind: type[errors.AioEngineError] = getattr(errors, self.type)
        error = kind.__new__(kind)  # without __init__, which would build the message again
        error.args = (self.text,)
        vars(error).update(self.fields)
        return error


class WorkerError(Exception):
    """A worker raised an exception that is not one of the package's own."""


_OfAdapters = Read | Add | Finish | Keep | Discard | Drop | Place
Request = Start | Build | Step | Masks | _OfAdapters | Measure
Answer = Planned | Stepped | ReadDone | Done | Failed | Measured
Report = Answer | Progress | Reading | Broken

_encoder = msgspec.msgpack.Encoder(enc_hook=plain)
requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def frame(message: Request | Report) -> bytes:
    """Encode a message for the wire. Raises ValueError if it is larger than ``MAX_BYTES``."""
    body = _encoder.encode(message)
    if len(body) > MAX_BYTES:
        raise ValueError(f"a message of {len(body):,} bytes: at most {MAX_BYTES:,} can be sent")
    return _LENGTH.pack(len(body)) + body


def plan_bytes(plan: object) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(plan))


async def read_report(reader: StreamReader) -> Report:
    """Read one report. Raises asyncio.IncompleteReadError at the end of the stream, and msgspec.MsgspecError
    for malformed data."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return reports.decode(await reader.readexactly(length))


def read_request(connection: socket.socket) -> Request | None:
    """Read one request. Blocks. Returns None at the end of the stream."""
    head = _receive(connection, _LENGTH.size)
    body = None if head is None else _receive(connection, *_LENGTH.unpack(head))
    return None if body is None else requests.decode(body)


def _receive(connection: socket.socket, count: int) -> bytearray | None:
    """Receive exactly ``size`` bytes; None if the other end closes first."""
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        new = connection.recv_into(view[got:])
        if new == 0:
            return None
        got += new
    return data
