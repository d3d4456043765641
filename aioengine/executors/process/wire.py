"""Messages between an engine and its workers: msgspec structs in msgpack, each preceded by its length.

Both ends have the same version of the package, so the format is private. A step contains only new data: a
request's tokens and blocks are sent once (see ``step_delta``).
"""

from __future__ import annotations

import pickle
import struct
import traceback
from typing import Any

import msgspec

from aioengine.checks import plain
from aioengine.config import EngineConfig
from aioengine.errors import AioEngineError
from aioengine.step import AdapterSource, LoadedAdapter

_LENGTH = struct.Struct("<Q")


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
    """Asks the worker to load the model, with as many KV blocks on all ranks; answered with Built."""

    num_blocks: int


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
    blocks: list[int] | None
    """Its block table; None: as it was."""
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
    """Asks for the read of an adapter, even if it was discarded meanwhile; answered with ReadDone."""

    read: int
    """Number of the read."""
    name: str
    path: str
    files: AdapterSource | None = None
    """Files that are read in place of a folder."""


class Add(_Message, frozen=True):
    """Adds a rank's ``squares``, from byte ``begin`` on, to a read; answered with None. All ranks receive the
    same parts in the same order. After the ``last``, the answer says that the read is finished."""

    read: int
    begin: int
    squares: bytes
    last: bool


class Settle(_Message, frozen=True):
    """Puts the result of a read into the CPU cache; without ``uid``, forgets it."""

    read: int
    uid: int | None = None


class Drop(_Message, frozen=True):
    """Frees an adapter's CPU memory."""

    uid: int


class Place(_Message, frozen=True):
    """Asks for the copy of an adapter into a slot, at ``offset`` in the slots' memory; answered with its
    seconds."""

    uid: int
    slot: int
    offset: int


class Measure(_Message, frozen=True):
    """Asks what was taken of the device's memory since the plan; answered with Measured."""


Message = Start | Build | Step | Masks | Read | Add | Settle | Drop | Place | Measure


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
    adapter: LoadedAdapter
    """The share that this rank keeps; the digest is "" if only that was read."""
    version: str
    """Version of the files' content, known without reading it."""
    squares: bytes
    """Sums that every rank must add before the read can be finished. They have the same length on all ranks;
    empty if it is finished."""


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
    """Encode a message for the wire."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Takes a stream of frames apart, however it was cut."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages, still encoded, that are complete with ``data``."""
        rest, found, begin = self._rest, list[bytes](), 0
        rest += data
        while len(rest) >= (body := begin + _LENGTH.size):
            end = body + _LENGTH.unpack_from(rest, begin)[0]
            if end > len(rest):
                break
            found.append(bytes(rest[body:end]))
            begin = end
        del rest[:begin]
        return found
