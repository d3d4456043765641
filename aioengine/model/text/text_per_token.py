"""Bounds how much text one token can stand for, which gives a lower bound on a text's tokens.

Derived from a tokenizer's parts. If a part may drop text, or is unknown here, there is no bound.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import tokenizers

from aioengine.model.text.token_bytes import byte_alphabet

_SHRINKS = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 3, "Prepend": 1, "ByteLevel": 1}
"""Normalizer -> how many times shorter, in bytes of UTF-8, it can make a text; a mathematical letter of
four bytes becomes one of one byte, and no character shrinks more."""
_KEEPING = {"ByteLevel", "Digits", "FixedLength", "Metaspace", "UnicodeScripts"}
"""Pre-tokenizers that drop nothing."""


class TextPerToken(NamedTuple):
    most: int
    """Maximum bytes of UTF-8 that a token stands for, not counting dropped ones."""
    dropped: bytes = b""
    """Bytes without a token, of which any number may be dropped or become one unknown token."""

    def least_tokens(self, text: str) -> int:
        """Return the minimum number of tokens of ``text``."""
        return -(-len(text.encode(errors="surrogatepass").translate(None, self.dropped)) // self.most)


def text_per_token(tokenizer: tokenizers.Tokenizer) -> TextPerToken | None:
    """Derive the bound of a tokenizer; None if there is none."""
    added = tokenizer.get_added_tokens_decoder().values()
    if tokenizer.truncation is not None or any(token.lstrip or token.rstrip for token in added):
        return None
    normalizers = _parts(tokenizer.normalizer, "normalizers")
    splitters = _parts(tokenizer.pre_tokenizer, "pretokenizers")
    shrinks = 1
    for part in normalizers:
        factor = _shrink(part)
        if factor is None:
            return None
        shrinks *= factor
    if not all(map(_keeps, splitters)):
        return None
    byte_level = any(part["type"] == "ByteLevel" for part in [*normalizers, *splitters])
    found = _of_model(tokenizer, byte_level=byte_level)
    if found is None or (found.dropped and any(part["type"] != "ByteLevel" for part in normalizers)):
        return None  # not known: what is dropped of what a normalizer makes of the text
    return found._replace(most=shrinks * max([found.most, *(len(token.content.encode()) for token in added)]))


def _of_model(tokenizer: tokenizers.Tokenizer, *, byte_level: bool) -> TextPerToken | None:
    model = tokenizer.model
    if not isinstance(model, tokenizers.models.BPE):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if byte_level:  # each character of a token stands for a byte
        dropped = b"".join(byte for letter, byte in byte_alphabet().items() if letter not in vocabulary)
        return TextPerToken(max(map(len, vocabulary)), dropped)
    whole = model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return TextPerToken(max(len(token.encode()) for token in vocabulary)) if whole else None


def _parts(component: Any, plural: str) -> list[dict[str, Any]]:
    """Return the settings of a normalizer or pre-tokenizer, one for each member of a sequence."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return _flat(state, plural)


def _flat(state: dict[str, Any], plural: str) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [part for member in state[plural] for part in _flat(member, plural)]


def _shrink(normalizer: dict[str, Any]) -> int | None:
    if normalizer["type"] != "Replace":
        return _SHRINKS.get(normalizer["type"])
    before = len(normalizer["pattern"].get("String", "").encode())
    after = len(normalizer["content"].encode())
    return -(-before // after) if before and after else None


def _keeps(splitter: dict[str, Any]) -> bool:
    if splitter["type"] in ("Split", "Punctuation"):
        return bool(splitter["behavior"] != "Removed")
    return splitter["type"] in _KEEPING
