"""How many tokens a text has at least; and that tokenizing leaves the interpreter to others."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from support.selection import mostly_slow
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from aioengine.errors import PromptTooLong
from aioengine.model.text.tokenizer import Tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "<|end|>", "\uff5cend\u2581of\uff5c"]
TEXTS = st.text(max_size=40) | st.text(alphabet="a \n\u212a\u030c\U0001d400\u1100\u1161\u11a8 ", max_size=60)


def byte_level() -> tokenizers.Tokenizer:
    words = ["aa", "aaaa", "\u0120\u0120", "\u0120\u0120\u0120\u0120"]
    merges = [("a", "a"), ("aa", "aa"), ("\u0120", "\u0120"), ("\u0120\u0120", "\u0120\u0120")]
    model = models.BPE({token: i for i, token in enumerate([*LETTERS, *words])}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    vocabulary = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "\u2581", "a", "aa", "\u2581\u2581"]
    model = models.BPE(
        {token: i for i, token in enumerate(vocabulary)},
        [("a", "a"), ("\u2581", "\u2581")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return tokenizer


def with_normalizer(normalizer: Any) -> tokenizers.Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizer
    return tokenizer


def with_pre_tokenizer(first: Any) -> tokenizers.Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel()])
    return tokenizer


def with_special_tokens() -> tokenizers.Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


BOUNDED = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "NFC": with_normalizer(normalizers.NFC()),
    "NFKC": with_normalizer(normalizers.NFKC()),
    "NFKD": with_normalizer(normalizers.NFKD()),
    "split": with_pre_tokenizer(pre_tokenizers.Split(Regex(r"\s+"), "isolated")),
    "digits": with_pre_tokenizer(pre_tokenizers.Digits(individual_digits=True)),
    "special tokens": with_special_tokens(),
}


@pytest.mark.parametrize("name", BOUNDED)
@given(text=TEXTS, repeated=st.integers(1, 20))
@pytest.mark.slow
def test_no_text_has_fewer_tokens_than_is_said(name: str, text: str, repeated: int) -> None:
    tokenizer = Tokenizer(BOUNDED[name])
    for whole in (text * repeated, " " * 40 * repeated, f"{text}{SPECIAL[-1]}" * repeated):
        tokens = tokenizer.encode(whole, add_special_tokens=False)
        assert tokenizer.least_tokens(whole) <= len(tokens)
        assert tokenizer.encode(whole, False, limit=len(tokens)) == tokens


@pytest.mark.parametrize("name", BOUNDED)
def test_what_cannot_fit_is_refused_before_it_is_tokenized(name: str) -> None:
    tokenizer = Tokenizer(BOUNDED[name])
    with pytest.raises(PromptTooLong) as refused:
        tokenizer.encode("a" * 100_000, limit=1000)
    assert refused.value.tokens > 1000 and refused.value.at_least


@pytest.mark.parametrize("name", mostly_slow(BOUNDED, *list(BOUNDED)[:4]))
@given(text=TEXTS, special=st.booleans())
@pytest.mark.slow
def test_the_ids_are_the_library_s(name: str, text: str, special: bool) -> None:
    library = BOUNDED[name]
    tokenizer = Tokenizer(library)
    expected = library.encode(text, add_special_tokens=special).ids
    assert tokenizer.encode(text, special) == expected
    assert tokenizer.decode(expected, False) == library.decode(expected, skip_special_tokens=False)
