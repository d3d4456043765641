"""Messages between the engine and its worker for grammars: each frame of their connection is a list of them,
as MessagePack."""

from __future__ import annotations

import struct
from itertools import count
from typing import Literal

import msgspec

from aioengine.grammars.limits import GrammarLimits

TEXT = struct.Struct("=Q")
"""Number of the text whose masks the worker computes now, in the file that it shares with the engine; else
0."""


class Message(msgspec.Struct, array_like=True, tag=True, gc=False):
    number: int
    """Of a question and its answer; that of a :class:`Compile` identifies the text from then on."""


class Hello(Message, tag=0):
    """The model's tokens, and bounds. Answered as a :class:`Compile` that succeeds."""

    tokenizer: str
    """The content of a ``tokenizer.json``."""
    vocab: int
    eos: list[int]
    limits: GrammarLimits


class Compile(Message, tag=1):
    text: str


class Drop(Message, tag=2):
    """Ends a compile, or forgets a text or one of its rows."""

    row: int | None = None


Outcome = Literal["compiled", "limit", "invalid", "failed"]


class Compiled(Message, tag=3):
    outcome: Outcome
    why: str = ""
    """What is wrong, if it is not compiled."""
    memory: int = 0
    """Bytes."""


class Ask(Message, tag=4):
    """Asks for the mask of a row after more tokens; of a new output, if ``afresh``."""

    text: int
    row: int
    owner: str | None
    """Owners take turns."""
    tokens: list[int]
    afresh: bool
    slow: bool
    """Whether the row's last mask took long; such rows give way to others."""


class Mask(Message, tag=5):
    mask: bytes
    forced: list[int]
    """Tokens that must follow the only one that the mask allows."""
    seconds: float
    """Processor time."""
    memory: int
    """Bytes that the text takes now."""
    why: str
    """What is wrong, if there is no mask."""


Question = Hello | Compile | Ask
Order = Question | Drop
Answer = Compiled | Mask

numbers = count(1)
"""For questions, and so for texts, and for rows: no two have the same, of whatever worker."""
encode = msgspec.msgpack.Encoder().encode
orders = msgspec.msgpack.Decoder(list[Order])
answers = msgspec.msgpack.Decoder(list[Answer])
