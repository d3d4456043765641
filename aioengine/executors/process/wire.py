"""Messages between an engine and its workers: msgspec structs in msgpack, each preceded by its length.

Both ends have the same version of the package, so the format is private. A step contains only new data: a
request's tokens and blocks are sent once (see ``step_delta``).
"""

from __future__ import annotations

import pickle
import socket
import struct
import traceback
from asyncio import StreamReader
from typing import Any

import msgspec

from aioengine.checks import plain
from aioengine.config import EngineConfig
from aioengine.errors import AioEngineError
from aioengine.step import AdapterSource

_LENGTH = struct.Struct("<I")
MAX_BYTES = 2**32 - 1
"""Maximum bytes of one message."""


class _Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages."""


# To the workers


class Start(_Message, frozen=True):
    """Asks for the rank's MemoryPlan, once all ranks have found each other."""

    config: EngineConfig
    rank: int
    size: int
    threads: int
    """Compute threads for this rank; 0: its share of torch's default."""
    rendezvous: str
    """A file or "tcp://host:port", where the ranks find each other; "" for one rank."""


class Build(_Message, frozen=True):
    """Asks the worker to load the model; answered with Built."""

    num_blocks: int
    """KV blocks, the same on all ranks."""


class Opened(msgspec.Struct, array_like=True, frozen=True):
    """What stays the same of a request that the workers have not seen before."""

    params: dict[str, Any]
    """The sampling parameters that are not the defaults; never the constraint."""
    constrained: bool
    seed: int
    prompt_len: int


class Row(msgspec.Struct, array_like=True, frozen=True):
    """A ``SequenceWork`` without what the workers know of its request."""

    request_id: str
    slot: int
    start: int
    count: int
    """Number of tokens to compute from position ``start``, without ``draft``."""
    sample: bool
    tokens: list[int]
    """Tokens to append to its history first."""
    kept_blocks: int
    """Number of leading blocks in its table that stay as they were."""
    blocks: list[int]
    """Blocks that follow them."""
    score: int = 0
    draft: list[int] = []
    scale: float = 1.0
    opened: Opened | None = None
    """Comes with the request's first row."""


class Step(_Message, frozen=True):
    """Asks for a step's StepResult. Only rank 0 has more than the seconds."""

    step: int
    ended: list[str]
    """Requests that have ended, and are forgotten before ``rows`` are read."""
    rows: list[Row]
    slot_ranks: list[int]


class Masks(_Message, frozen=True):
    """Follows a step in which a sequence with a constraint is sampled."""

    step: int
    found: dict[int, bytes]
    """Allowed tokens by index in ``rows``; late ones are left out."""


class Read(_Message, frozen=True):
    """Asks for the read of an adapter, even if it was discarded meanwhile; answered with ReadDone. The number
    of this question is the number of the read."""

    name: str
    path: str
    files: AdapterSource | None = None
    """Files that are read in place of a folder."""


class Add(_Message, frozen=True):
    """Adds a rank's ``squares``, from byte ``begin`` on, to a read. All ranks receive the same parts in the
    same order."""

    read: int
    begin: int
    squares: bytes


class Finish(_Message, frozen=True):
    """Asks for the end of a read, to which everything has been added; answered with None."""

    read: int


class Keep(_Message, frozen=True):
    """Puts the result of a read into the CPU cache."""

    read: int
    uid: int


class Discard(_Message, frozen=True):
    """Forgets a read and its result."""

    read: int


class Drop(_Message, frozen=True):
    """Frees an adapter's CPU memory."""

    uid: int


class Place(_Message, frozen=True):
    """Asks for the copy of an adapter into a slot; answered with its seconds."""

    uid: int
    slot: int
    offset: int
    """Offset in the slots' memory, in bytes."""


class Measure(_Message, frozen=True):
    """Asks what was taken of the device's memory since the plan; answered with Measured."""


Message = Start | Build | Step | Masks | Read | Add | Finish | Keep | Discard | Drop | Place | Measure


class Request(msgspec.Struct, array_like=True, frozen=True):
    """A message with the number that its answer has."""

    number: int
    message: Message


# From the workers


class Built(msgspec.Struct, array_like=True, frozen=True):
    kernels: str
    """Names of the kernels."""
    variance: str | None
    """Reason why a token's bits depend on its batch."""


class Measured(msgspec.Struct, array_like=True, frozen=True):
    taken: int | None
    """Result of :meth:`aioengine.executors.base.Device.memory_taken` on this rank."""


class ReadDone(msgspec.Struct, array_like=True, frozen=True):
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


class Answer(_Message, frozen=True):
    number: int
    value: msgspec.Raw
    """What was asked for, in msgpack."""


class Failed(_Message, frozen=True):
    """What was asked for has failed; the worker goes on."""

    number: int
    error: bytes
    """See :func:`unpack_error`."""


class Broken(_Message, frozen=True):
    """This worker cannot go on: its start or a step has failed."""

    error: bytes


class Progress(_Message, frozen=True):
    """Progress of reading the model's files; see ``LoadProgress``."""

    stage: str
    done: int
    total: int


class Reading(_Message, frozen=True):
    """Says from time to time that the read ``number`` goes on."""

    number: int


Report = Answer | Failed | Broken | Progress | Reading


class WorkerError(Exception):
    """A worker raised an exception that is not one of the package's own."""


def pack_error(error: BaseException) -> bytes:
    """Pack an error of this package unchanged, without its traceback, and another one as its text and
    traceback."""
    if not isinstance(error, AioEngineError):
        name, trace = type(error).__name__, "".join(traceback.format_exception(error))
        error = WorkerError(f"{name}: {error}" if str(error) else name)
        error.add_note(f"in the worker:\n{trace}")
    return pickle.dumps(error)


def unpack_error(data: bytes) -> Exception:
    error = pickle.loads(data)  # the worker is this engine's own, with the same code
    assert isinstance(error, Exception)
    return error


_encoder = msgspec.msgpack.Encoder(enc_hook=plain)
requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def answer(number: int, value: object) -> Answer:
    return Answer(number, msgspec.Raw(_encoder.encode(value)))


def frame(message: Request | Report) -> bytes:
    """Encode a message for the wire. Raises ValueError if it is larger than ``MAX_BYTES``."""
    body = _encoder.encode(message)
    if len(body) > MAX_BYTES:
        raise ValueError(f"a message of {len(body):,} bytes: at most {MAX_BYTES:,} can be sent")
    return _LENGTH.pack(len(body)) + body


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
    """Receive exactly ``count`` bytes; None if the other end closes first."""
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        new = connection.recv_into(view[got:])
        if new == 0:
            return None
        got += new
    return data
