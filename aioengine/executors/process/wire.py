"""What an engine and its workers say to each other: msgspec messages in msgpack, each with its length first.

Both ends are of one version of the package, so the format is nobody else's business. A message
grows with what is new: a request's tokens and blocks are sent once (see ``step_delta``).
"""

from __future__ import annotations

import socket
import struct
import traceback
from asyncio import StreamReader
from typing import Any

import msgspec

from aioengine import errors
from aioengine.config import EngineConfig
from aioengine.request import TokenLogprob
from aioengine.step import Sampled

_LENGTH = struct.Struct("<I")
MAX_BYTES = 2**32 - 1
"""Of one message."""


class _Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages."""


# To the workers


class Start(_Message, frozen=True):
    """Say what you would allocate; answered with Planned."""

    number: int
    config: EngineConfig
    rank: int
    size: int
    threads: int
    """Compute threads for this rank; 0: its share of what torch would take."""
    rendezvous: str
    """A file where the ranks find each other; "" for one rank."""


class Build(_Message, frozen=True):
    """Load the model; answered with Done."""

    number: int
    num_blocks: int
    """KV blocks, the same on all ranks."""


class Opened(msgspec.Struct, array_like=True, frozen=True):
    """A request that the workers have not seen before."""

    key: int
    """What stands for it from now on."""
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
    """Compute so many tokens from position ``start``."""
    sample: bool
    tokens: list[int]
    """What to append to its history before that."""
    kept_blocks: int
    """How many of the blocks in its table, from the first, stay as they were."""
    blocks: list[int]
    """What follows them."""
    score: int = 0
    """As in ``SequenceWork``."""


class Step(_Message, frozen=True):
    """Answered with Stepped."""

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
    """By index in ``work``: the tokens that its constraint allows; without those that are late."""


class Read(_Message, frozen=True):
    """Read an adapter; answered with ReadDone or Failed, if it was discarded meanwhile too."""

    number: int
    name: str
    path: str


class Add(_Message, frozen=True):
    """To what was read as ``number``: what a rank's ``squares`` are from byte ``begin`` on. All ranks get all
    of it in the same order."""

    number: int
    begin: int
    squares: bytes


class Finish(_Message, frozen=True):
    """All has been added to what was read as ``read``; answered with Done or Failed."""

    number: int
    read: int


class Keep(_Message, frozen=True):
    """Put what was read as ``number`` into the CPU cache."""

    number: int
    uid: int


class Discard(_Message, frozen=True):
    """Forget what was read, or is still being read, as ``number``."""

    number: int


class Drop(_Message, frozen=True):
    """Free an adapter's CPU memory."""

    uid: int


class Place(_Message, frozen=True):
    """Copy an adapter into a slot; answered with Done or Failed."""

    number: int
    uid: int
    slot: int


# From the workers


class Planned(_Message, frozen=True):
    """All ranks have found each other. ``plan`` is the memory plan in msgpack."""

    number: int
    num_blocks: int
    plan: msgspec.Raw


class Progress(_Message, frozen=True):
    """How far the model's files are read; see ``LoadProgress``."""

    stage: str
    done: int
    total: int


class Stepped(_Message, frozen=True):
    number: int
    sampled: list[Sampled | None] | None
    """From rank 0."""
    seconds: float
    scored: dict[int, list[TokenLogprob]] = {}
    """From rank 0."""


class Reading(_Message, frozen=True):
    """The read ``number`` goes on; said from time to time."""

    number: int


class ReadDone(_Message, frozen=True):
    number: int
    rank: int
    """The adapter's."""
    nbytes: int
    """Of the share that is kept."""
    digest: str
    """Of the content; "" if not all of it was read, because there are several ranks."""
    version: str
    """What tells the files' content from another, without reading it."""
    squares: bytes
    """What is to be added on every rank before it can be finished; all ranks say as much. Empty: nothing, it
    is finished."""


class Done(_Message, frozen=True):
    number: int
    seconds: float
    kernels: str = ""
    """Of an answer to Build: what computes the steps."""
    variance: str | None = None
    """Of an answer to Build: why a token's bits depend on its batch."""


class Failed(_Message, frozen=True):
    """What ``number`` asked for has failed, and nothing else."""

    number: int
    error: WireError


class Broken(_Message, frozen=True):
    """This worker cannot go on: its start or a step has failed."""

    error: WireError


class WireError(msgspec.Struct, array_like=True, frozen=True):
    """An exception, with everything that the package's own carry."""

    type: str
    text: str
    fields: dict[str, Any] | None = None
    """Of an ``AioEngineError``; None for another one."""
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
        """The same again; :class:`WorkerError` for one that is not of :mod:`aioengine.errors`."""
        if self.fields is None:
            error: Exception = WorkerError(f"{self.type}: {self.text}" if self.text else self.type)
            error.add_note(f"in the worker:\n{self.trace}")
            return error
        kind: type[errors.AioEngineError] = getattr(errors, self.type)
        error = kind.__new__(kind)  # its __init__ makes the message that is here already
        error.args = (self.text,)
        vars(error).update(self.fields)
        return error


class WorkerError(Exception):
    """An exception of another kind than the package's own was raised in a worker."""


Request = Start | Build | Step | Masks | Read | Add | Finish | Keep | Discard | Drop | Place
Answer = Planned | Stepped | ReadDone | Done | Failed
Report = Answer | Progress | Reading | Broken

_encoder = msgspec.msgpack.Encoder()
requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def frame(message: Request | Report) -> bytes:
    """The bytes that go over the wire."""
    body = _encoder.encode(message)
    if len(body) > MAX_BYTES:
        raise ValueError(f"a message of {len(body):,} bytes: at most {MAX_BYTES:,} can be sent")
    return _LENGTH.pack(len(body)) + body


def plan_bytes(plan: object) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(plan))


async def read_report(reader: StreamReader) -> Report:
    """Raises asyncio.IncompleteReadError at the end, and msgspec.MsgspecError for what is no report."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return reports.decode(await reader.readexactly(length))


def read_request(connection: socket.socket) -> Request | None:
    """Blocks. None at the end."""
    head = _receive(connection, _LENGTH.size)
    body = None if head is None else _receive(connection, *_LENGTH.unpack(head))
    return None if body is None else requests.decode(body)


def _receive(connection: socket.socket, count: int) -> bytearray | None:
    """Exactly so many bytes; None if the other end goes before."""
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        new = connection.recv_into(view[got:])
        if new == 0:
            return None
        got += new
    return data
