"""The vocabulary as llguidance sees it: text is never written with added tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper


def load_vocabulary(text: str, vocab: int, eos: Sequence[int]) -> LLTokenizer:
    """Build it from the content of a ``tokenizer.json``. Raises ValueError for a kind of tokenizer that
    llguidance does not know."""
    own = LLTokenizer(text, n_vocab=vocab, eos_token=list(eos) or None)
    return LLTokenizer(TokenizerWrapper(_Literal(own)), n_vocab=vocab, eos_token=own.eos_tokens)


class _Literal:
    """Tokenizes text that a grammar forces as the model's tokenizer does, but without added tokens.

    A tokenizer makes one token of a text such as "<think>" if that was added to its vocabulary. To a grammar
    such a token is not text: ``"<think>"`` means these seven characters, and ``<[id]>`` the token. If forced
    text were tokenized that way, the grammar would refuse the token that it has forced itself.
    """

    def __init__(self, own: LLTokenizer) -> None:
        self._own = own
        tokens = range(own.vocab_size)
        self._added = frozenset(token for token in tokens if own.is_special_token(token))
        # What llguidance asks for.
        self.eos_token_id = own.eos_token
        self.bos_token_id = None
        self.special_token_ids = sorted(self._added)
        self.tokens = [own.decode_bytes([token]) for token in tokens]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("takes text")  # so that it is not called with bytes
        tokens = self._own.tokenize_str(text)
        return tokens if self._added.isdisjoint(tokens) else self._own.greedy_tokenize(text)
