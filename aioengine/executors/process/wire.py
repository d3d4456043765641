"""Messages between an engine and its workers: msgspec structs in msgpack, each preceded by its length.

A step contains only new data: a request's tokens and blocks are sent once. (Steps sent whole would grow with
the history: for 64 requests of 1,000 tokens they take 20 times as long to encode and decode.)
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from operator import attrgetter
from typing import Any

import msgspec

from aioengine.checks import plain
from aioengine.config import EngineConfig
from aioengine.errors import AioEngineError
from aioengine.request import SamplingParams, pack_params
from aioengine.step import AdapterSource, LoadedAdapter, SequenceWork, StepBatch

_LENGTH = struct.Struct("<Q")
_FIELDS = [field.name for field in dataclasses.fields(SequenceWork)]
_BLOCK_TABLE, _HISTORY, _PARAMS = map(_FIELDS.index, ("block_table", "history", "params"))
_values_of = attrgetter(*_FIELDS)


class _Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages."""


# To the workers


class Start(_Message, frozen=True):
    """Asks for the rank's MemoryPlan, once all ranks have found each other."""

    config: EngineConfig
    rendezvous: str
    """A file or "tcp://host:port", where the ranks find each other; "" for one rank."""


class Build(_Message, frozen=True):
    """Asks the worker to load the model, with as many KV blocks on all ranks; answered with the names of the
    kernels, and the reason why a token's bits depend on its batch, if they do."""

    num_blocks: int


class Step(_Message, frozen=True):
    """Asks for a step's StepResult. Only rank 0 has more than the seconds."""

    step: int
    ended: list[str]
    """Requests that have ended, and are forgotten before ``rows`` are read."""
    rows: list[Any]
    """Each row as the list of a ``SequenceWork``'s fields, of which a worker gets only what it does not know:
    ``history`` has the new tokens, ``block_table`` is None if it is as it was, and ``params``, which come
    with a request's first row, are those that are not the defaults."""
    slot_ranks: list[int]


class Masks(_Message, frozen=True):
    """Follows a step in which a sequence with a constraint is sampled."""

    found: dict[int, bytes]
    """Allowed tokens by index in ``rows``; late ones are left out."""


class Read(_Message, frozen=True):
    """Asks for the read of an adapter into the CPU cache, under its uid; answered with ReadDone, even if the
    adapter was dropped meanwhile."""

    uid: int
    name: str
    path: str
    files: AdapterSource | None = None
    """Files that are read in place of a folder."""


class Finish(_Message, frozen=True):
    """Finishes a read with the sums of all ranks, in the order of the ranks; answered with None."""

    uid: int
    squares: list[bytes]


class Drop(_Message, frozen=True):
    """Frees an adapter's CPU memory, also of one whose read has failed or still runs."""

    uid: int


class Place(_Message, frozen=True):
    """Asks for the copy of an adapter into a slot, at ``offset`` in the slots' memory; answered with its
    seconds."""

    uid: int
    slot: int
    offset: int


Message = Start | Build | Step | Masks | Read | Finish | Drop | Place


class Request(msgspec.Struct, array_like=True, frozen=True):
    """A message with the number that its answer has."""

    number: int
    message: Message


# From the workers


class ReadDone(msgspec.Struct, array_like=True, frozen=True):
    adapter: LoadedAdapter
    """The share that this rank keeps; rank 0's has the digest."""
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
    """What was asked for has failed."""

    number: int | None
    """None: this worker cannot go on, because its start or a step has failed."""
    error: bytes
    """See :func:`unpack_error`."""


class Reading(_Message, frozen=True):
    """Says from time to time that the read ``number`` goes on."""

    number: int


Report = Answer | Failed | Reading


# Steps


class StepEncoder:
    """Encoder on the engine's side: it sends of each request only what the workers do not know. An ended
    request must be forgotten before its id is used again."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[int, list[int]]] = {}
        """Number of a request's tokens that were sent, and its block table as it was sent last."""
        self._ended: list[str] = []

    def forget(self, request_id: str) -> None:
        """Note that a request has ended; the workers are told with the next step."""
        if self._sent.pop(request_id, None) is not None:
            self._ended.append(request_id)

    def encode(self, batch: StepBatch) -> Step:
        """Encode a step, which then counts as sent."""
        ended, self._ended = self._ended, []
        return Step(batch.step, ended, list(map(self._news, batch.sequences)), list(batch.slot_ranks))

    def _news(self, work: SequenceWork) -> list[Any]:
        sent, params = self._sent.get(work.request_id), None
        if sent is None:
            sent, params = (0, []), pack_params(work.params)
            if work.params.constraint is not None:
                params["constraint"] = True
        known, table = sent
        blocks = None if table == work.block_table else list(work.block_table)
        self._sent[work.request_id] = len(work.history), table if blocks is None else blocks
        row = list(_values_of(work))
        row[_BLOCK_TABLE], row[_HISTORY], row[_PARAMS] = blocks, work.history[known:], params
        return row


class SentConstraint:
    """Stand-in for a constraint that lives in the engine's process; its masks arrive after the step."""

    slow = False
    index: int
    """Its request's row in the running step."""
    masks: Future[Mapping[int, bytes]]
    """Future of the masks of the running step, by row; late ones are left out."""

    def begin(self, output: Sequence[int]) -> None:
        """Do nothing, because the engine has already begun."""

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        return self.masks.result().get(self.index)

    def allowed(self, output: Sequence[int]) -> bytes:
        return self.poll(output, 0) or b""


class StepDecoder:
    """Decoder on a worker's side."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[SamplingParams, list[int], list[int]]] = {}
        """The parameters, the history and the block table of each request."""

    def decode(self, step: Step, masks: Future[Mapping[int, bytes]]) -> StepBatch:
        """Decode a step. ``masks`` gets what the constraints of its rows allow."""
        for request_id in step.ended:
            del self._known[request_id]
        works = [SequenceWork(*row) for row in step.rows]
        for index, work in enumerate(works):
            packed: Any = work.params
            if packed is not None:
                constraint = SentConstraint() if packed.pop("constraint", False) else None
                self._known[work.request_id] = SamplingParams(**packed, constraint=constraint), [], []
            work.params, history, blocks = self._known[work.request_id]
            if isinstance(work.params.constraint, SentConstraint):
                work.params.constraint.index, work.params.constraint.masks = index, masks
            history += work.history
            if work.block_table is not None:
                blocks[:] = work.block_table
            work.history, work.block_table = history, blocks
        return StepBatch(step.step, works, step.slot_ranks)


# Errors and frames


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

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages, still encoded, that are complete with ``data``."""
        rest, begin = self._rest, 0
        rest += data
        while len(rest) >= (body := begin + _LENGTH.size):
            end = body + _LENGTH.unpack_from(rest, begin)[0]
            if end > len(rest):
                break
            yield bytes(rest[body:end])
            begin = end
        del rest[:begin]
