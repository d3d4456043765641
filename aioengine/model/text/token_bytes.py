"""Bytes that each token stands for, which is finer than text: a character may be several tokens."""

from __future__ import annotations

import json
import re

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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
