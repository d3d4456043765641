"""A tokenizer of bytes for the grammar compiler."""

from __future__ import annotations

import pytest

llguidance = pytest.importorskip("llguidance")


class Bytes:
    """A tokenizer whose tokens are the bytes, for the compiler."""

    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([i]) for i in range(256)), b"<eos>"]  # noqa: RUF012
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


TOKENS = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257)
