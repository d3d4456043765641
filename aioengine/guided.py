"""Guided decoding: constraints out of JSON schemas, regular expressions and grammars (extra ``guided``).

llguidance does the parsing: for each token that has been chosen it says which may come next.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aioengine.errors import ConfigError, RequestInvalid
from aioengine.request import TokenConstraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from aioengine.engine import AsyncEngine

_CACHED_GRAMMARS = 64
MAX_GRAMMAR = 2**18
"""Characters of a grammar. The time to compile one grows with the square of its size: at three million
characters it is most of a minute, in which a thread is busy."""
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
"""Of unbounded white space a model that knows no better can produce any amount."""


class Guide:
    """Makes constraints for one engine's model.

    >>> guide = Guide(engine)
    >>> constraint = await guide.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
    >>> await engine.complete("...", SamplingParams(constraint=constraint))

    Compiling happens in a thread; compiled grammars are kept. Raises ConfigError if llguidance is not
    installed or the model has no tokenizer. The methods raise RequestInvalid for a grammar that is
    malformed, too complex, or uses what llguidance does not support.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError("guided decoding needs llguidance: pip install 'aioengine[guided]'") from error
        tokenizer = engine.tokenizer
        if tokenizer is None:
            raise ConfigError(f"guided decoding needs a tokenizer, and {engine.config.model} has none")
        self._library = llguidance
        self._tokenizer = tokenizer
        self._spec = engine.model_spec
        self._compiled_tokenizer: LLTokenizer | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    async def json_object(self) -> TokenConstraint:
        """Any JSON object."""
        return await self.json_schema({"type": "object"})

    async def json_schema(self, schema: Mapping[str, Any] | str) -> TokenConstraint:
        """JSON that conforms to ``schema``."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        from_schema = self._library.LLMatcher.grammar_from_json_schema
        return await self._constraint(lambda: from_schema(text, defaults=_JSON_OPTIONS))  # type: ignore[arg-type]

    async def regex(self, pattern: str) -> TokenConstraint:
        """Text that matches a regular expression (in Rust's syntax) as a whole."""
        return await self._constraint(lambda: self._library.LLMatcher.grammar_from_regex(pattern))

    async def choice(self, options: Sequence[str]) -> TokenConstraint:
        """One of these texts."""
        if not options:
            raise RequestInvalid("choice=[]: must have at least one text")
        return await self.lark("start: " + " | ".join(json.dumps(option) for option in options))

    async def lark(self, grammar: str) -> TokenConstraint:
        """Text of a context-free grammar in Lark's notation, from its rule ``start``."""
        return await self._constraint(lambda: self._library.LLMatcher.grammar_from_lark(grammar))

    async def _constraint(self, grammar: Callable[[], str]) -> TokenConstraint:
        return await asyncio.to_thread(self._compile, grammar)

    def _compile(self, grammar: Callable[[], str]) -> TokenConstraint:
        try:
            text = grammar()
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestInvalid(f"the grammar is malformed: {error}") from error
        if len(text) > MAX_GRAMMAR:
            raise RequestInvalid(
                f"the grammar has {len(text)} characters, and at most {MAX_GRAMMAR} are compiled"
            )
        with self._lock:
            if self._compiled_tokenizer is None:
                self._compiled_tokenizer = self._library.LLTokenizer(
                    self._tokenizer.to_json(),
                    n_vocab=self._spec.vocab_size,
                    eos_token=list(self._spec.eos_token_ids) or None,
                )
            tokenizer = self._compiled_tokenizer
            matcher = self._matchers.pop(text, None)
            if matcher is not None:
                self._matchers[text] = matcher
                return GrammarConstraint(matcher.deep_copy())
        matcher = self._library.LLMatcher(tokenizer, text, log_level=0)
        if matcher.is_error():
            raise RequestInvalid(f"the grammar cannot be used: {_first_line(matcher)}")
        with self._lock:
            self._matchers[text] = matcher
            while len(self._matchers) > _CACHED_GRAMMARS:
                self._matchers.popitem(last=False)
            return GrammarConstraint(matcher.deep_copy())


class GrammarConstraint:
    """A :class:`~aioengine.request.TokenConstraint` that follows the output with a parser."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._consumed: list[int] = []

    def allowed(self, output: Sequence[int]) -> bytes:
        """Raises ValueError if ``output`` does not conform, or the parser gives up."""
        tokens = list(output)
        known = len(self._consumed)
        if tokens[:known] != self._consumed:  # another output than the last time
            self._matcher.reset()
            known = 0
        if len(tokens) > known and not self._matcher.consume_tokens(tokens[known:]):
            raise ValueError(_first_line(self._matcher))
        self._consumed = tokens
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError(_first_line(self._matcher))
        return mask


def _first_line(matcher: LLMatcher) -> str:
    lines = [line for line in matcher.get_error().splitlines() if line.strip()]
    if lines and lines[0].startswith("<grammar>") and "</grammar>" in lines:
        lines = lines[lines.index("</grammar>") + 1 :]
    return lines[0][:500] if lines else "unknown error"
