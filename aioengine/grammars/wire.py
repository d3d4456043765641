"""Messages between the engine and its worker for grammars: a length, and a struct as MessagePack."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

LENGTH = NUMBER = struct.Struct("=I")
NOTES = 16
"""Texts that the worker can note that it is busy with."""


class Message(msgspec.Struct, array_like=True, tag=True, gc=False):
    pass


class Hello(Message, tag=0):
    """The model's tokens, and bounds."""

    tokenizer: str
    """The content of a ``tokenizer.json``."""
    vocab: int
    eos: list[int]
    compile_seconds: float
    memory: int
    """Maximum bytes of one text."""
    total_memory: int
    mask_seconds: float


class Compile(Message, tag=1):
    number: int
    """Identifies the text from now on."""
    text: str


class Drop(Message, tag=2):
    """Ends a compile, or forgets a text."""

    number: int


class Compiled(Message, tag=3):
    number: int
    status: int = 0
    """Exit status of the child that tried the text."""
    why: str = ""
    """Why the worker or the grammar is no good; empty if it is good."""
    memory: int = 0
    """Bytes."""


class Ask(Message, tag=4):
    """Asks for the mask of a row after more tokens; of a new output, if ``afresh``."""

    text: int
    row: int
    number: int
    owner: str | None
    """Owners take turns."""
    tokens: list[int]
    afresh: bool


class Forget(Message, tag=5):
    text: int
    row: int


class Mask(Message, tag=6):
    number: int
    mask: bytes
    forced: list[int]
    """Tokens that must follow the only one that the mask allows."""
    seconds: float
    """Processor time."""
    memory: int
    """Bytes that the text takes now."""
    why: str
    """What is wrong, if there is no mask."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Hello | Compile | Drop | Compiled | Ask | Forget | Mask).decode


def frame(message: Message) -> bytes:
    data = _encode(message)
    return LENGTH.pack(len(data)) + data


class Inbox:
    """Messages from the bytes that come."""

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, data: bytes) -> Iterator[Any]:
        """Return the messages that ``data`` completes."""
        self._data += data
        begin = 0
        while len(self._data) - begin >= LENGTH.size:
            end = begin + LENGTH.size + LENGTH.unpack_from(self._data, begin)[0]
            if len(self._data) < end:
                break
            yield _decode(memoryview(self._data)[begin + LENGTH.size : end].tobytes())
            begin = end
        del self._data[:begin]
