"""Incremental detokenization, which turns token ids into text that will not change, and stop strings.

The text of a token depends on its neighbours: a byte-level token may hold part of a character, and
decoders treat the first token of a sequence specially. So each step decodes a short window whose
start has been emitted already, and emits what lies beyond it. It holds back text that the next token could
still change: an incomplete UTF-8 sequence (byte-level BPE decodes it to one trailing U+FFFD) and a run of
byte-fallback tokens (``<0xE4>``), which is decoded as a whole and, if invalid, differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"
# Tokens kept as context. More than 3, so that it holds the whole of an incomplete UTF-8 sequence:
# then the context alone ends with U+FFFD exactly if the full text does.
_CONTEXT = 6


def special_tokens(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """Tokens that ``decode(..., skip_special_tokens=True)`` leaves out."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


class Detokenizer:
    """Decodes one sequence as it grows. The concatenated results of :meth:`push` and a final
    :meth:`finish` equal ``tokenizer.decode(all_ids, skip_special_tokens=...)``, where true means that
    ``skipped`` are the :func:`special_tokens`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, skipped: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._window: list[int] = []
        self._is_byte: list[bool] = []
        self._emitted = 0
        """Characters of the window's text that have been emitted."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Append tokens; returns the text that has become certain (possibly empty)."""
        for token_id in token_ids:
            text = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
            if text is not None:  # decode() ignores ids outside the vocabulary, too
                self._window.append(token_id)
                self._is_byte.append(_BYTE_TOKEN.fullmatch(text) is not None)
        settled = len(self._window)
        while settled and self._is_byte[settled - 1]:
            settled -= 1
        text = self._decode(self._window[:settled])
        if text.endswith(_REPLACEMENT):
            text = text[:-1]
        delta = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        if settled == len(self._window) and settled >= 2 * _CONTEXT:
            self._shrink()
        return delta

    def finish(self) -> str:
        """Return the text held back; an incomplete UTF-8 sequence at the end becomes U+FFFD."""
        text = self._decode(self._window)
        delta = text[self._emitted :]
        self._emitted = len(text)
        return delta

    def _shrink(self) -> None:
        """Drop the window's start. A character or a byte run cut there decodes to U+FFFD, which later
        tokens cannot change (the last token is no byte token), and which counts as emitted."""
        start = len(self._window) - _CONTEXT
        text = self._decode(self._window[start:])
        if not text:
            return
        del self._window[:start], self._is_byte[:start]
        self._emitted = len(text) - text.endswith(_REPLACEMENT)

    def _decode(self, ids: list[int]) -> str:
        # Skipped tokens never enter the window.
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


class TextDelta(NamedTuple):
    text: str
    stop: str | None = None
    """The stop string that was found; ``text`` ends before it, or with it, and nothing follows."""


class TextStream:
    """Text of one sequence up to its first stop string.

    Equals the full text cut at the smallest index where any of ``stop`` occurs, however the tokens
    are chunked; of several stop strings at that index the shortest is reported. Text that may be the
    beginning of a stop string is held back. A match is held back, too, while an earlier one is still
    possible (stop strings "abc" and "b" after "ab"). With ``include_stop`` the cut is after it.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: tuple[str, ...] = (), include_stop: bool = False
    ) -> None:
        self._detokenizer = detokenizer
        self._include_stop = include_stop
        self._stop = tuple(sorted(stop, key=len))
        self._held = ""
        self.stopped: str | None = None
        """The stop string found so far; also set by :meth:`finish`."""

    def push(self, token_ids: Sequence[int], *, look: bool = True) -> TextDelta:
        """Append tokens; after a stop string was found, further tokens are ignored. Without ``look`` none
        is looked for in all that has come up to here."""
        if self.stopped is not None:
            return TextDelta("", self.stopped)
        self._held += self._detokenizer.push(token_ids)
        if not self._stop or not look:
            return self._emit(len(self._held))
        at, stop = self._first_match()
        possible = self._first_beginning()
        if stop is not None and at <= possible:
            self.stopped = stop
            return self._emit(self._cut(at))
        return self._emit(min(at, possible))

    def finish(self) -> str:
        """Return the text held back, cut at a stop string if it holds one (then ``stopped`` is set)."""
        if self.stopped is not None:
            return ""
        self._held += self._detokenizer.finish()
        at, self.stopped = self._first_match()
        return self._emit(self._cut(at)).text

    def _cut(self, at: int) -> int:
        """Return where the text ends if a stop string was found at ``at``."""
        return at + len(self.stopped) if self.stopped and self._include_stop else at

    def _emit(self, end: int) -> TextDelta:
        text, self._held = self._held[:end], "" if self.stopped else self._held[end:]
        return TextDelta(text, self.stopped)

    def _first_match(self) -> tuple[int, str | None]:
        """Index of the earliest stop string in the held text, or the text's length and None."""
        at, found = len(self._held), None
        for stop in self._stop:
            index = self._held.find(stop)
            if 0 <= index < at:
                at, found = index, stop
        return at, found

    def _first_beginning(self) -> int:
        """The earliest index whose rest is a proper beginning of a stop string, or the length."""
        length = len(self._held)
        longest = len(self._stop[-1])
        for index in range(max(0, length - longest + 1), length):
            rest = self._held[index:]
            if any(len(stop) > len(rest) and stop.startswith(rest) for stop in self._stop):
                return index
        return length


class TokenBytes:
    """Reads the two ways in which vocabularies write bytes: GPT-2's alphabet, where every byte is a
    printable character (" " is "Ġ"), and SentencePiece's, with "▁" for a space and "<0x0A>" for a byte.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._alphabet = byte_alphabet() if _is_byte_level(tokenizer) else None

    def __call__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        text: str | None = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if text is None:
            return b""
        if self._alphabet is not None:
            return b"".join(self._alphabet.get(char) or char.encode() for char in text)
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes.fromhex(byte[1]) if byte else text.replace("▁", " ").encode()


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether its decoder is, or contains, ByteLevel."""
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    parts = [decoder, *decoder.get("decoders", [])]
    return any(part["type"] == "ByteLevel" for part in parts)


def byte_alphabet() -> dict[str, bytes]:
    """Return GPT-2's alphabet: bytes that print stand for themselves, the others for characters from U+0100
    on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
