"""Tokens as bytes, for both ways of writing them in a vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokenizer import byte_tokenizer
from tokenizers import Tokenizer, decoders, models

from aioengine.model.text.detokenizer import TokenBytes


@pytest.mark.parametrize("in_sequence", [False, True])
def test_byte_level(in_sequence: bool) -> None:
    tokenizer = byte_tokenizer(special=["<é>"])
    if in_sequence:
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])  # type: ignore[assignment]
    token_bytes = TokenBytes(tokenizer)
    assert sorted(token_bytes(i) for i in range(256)) == [bytes([i]) for i in range(256)]
    assert token_bytes(256) == "<é>".encode()
    assert token_bytes(257) == token_bytes(-1) == token_bytes(2**40) == b""


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text())
def test_byte_level_adds_up(text: str) -> None:
    tokenizer = byte_tokenizer()
    token_bytes = TokenBytes(tokenizer)
    assert b"".join(map(token_bytes, tokenizer.encode(text).ids)) == text.encode()


def test_sentencepiece() -> None:
    vocab = {"▁": 0, "▁hi": 1, "<0x0A>": 2, "<0xE4>": 3, "é": 4, "<0xzz>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes(i) for i in range(6)] == [b" ", b" hi", b"\n", b"\xe4", "é".encode(), b"<0xzz>"]


def test_no_decoder_at_all() -> None:
    tokenizer = Tokenizer(models.WordLevel(vocab={"word": 0}, unk_token="word"))
    assert TokenBytes(tokenizer)(0) == b"word"
