"""How much text one token can stand for, from which follows how many tokens a text has at least.

Read off a tokenizer's parts. Where a part may drop text, or is one that is not known here, nothing is
promised, and a text's length says nothing about its tokens.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

_SHRINKS = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 3, "Prepend": 1, "ByteLevel": 1}
"""Normalizer -> how many times shorter, in bytes of UTF-8, it can make a text; a mathematical letter of
four bytes becomes one of one byte, and no character shrinks more."""
_KEEPING = {"ByteLevel", "Digits", "FixedLength", "Metaspace", "UnicodeScripts"}
"""Pre-tokenizers that drop nothing."""


def bytes_per_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Bytes of UTF-8 that a token stands for at most; None if there may be no such bound."""
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
    longest = _longest_token(tokenizer, byte_level=byte_level)
    if longest is None:
        return None
    return shrinks * max([longest, *(len(token.content.encode()) for token in added)])


def _longest_token(tokenizer: tokenizers.Tokenizer, *, byte_level: bool) -> int | None:
    """Bytes of the longest token; None if text may be dropped, or any length of it become one unknown
    token, because not every byte has a token of its own."""
    model = tokenizer.model
    if not isinstance(model, tokenizers.models.BPE):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if byte_level:  # each character of a token stands for a byte
        whole = all(letter in vocabulary for letter in tokenizers.pre_tokenizers.ByteLevel.alphabet())
        return max(map(len, vocabulary)) if whole else None
    whole = model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return max(len(token.encode()) for token in vocabulary) if whole else None


def _parts(component: Any, plural: str) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, one for each member of a sequence."""
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
