"""Guided decoding: constraints from JSON schemas, regular expressions and grammars (extra ``guided``).

llguidance does the parsing in a separate process (:mod:`aioengine.grammars`). After each chosen token it says
which tokens may come next.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from aioengine.errors import ConfigError, RequestInvalid
from aioengine.grammars.limits import GrammarLimits
from aioengine.grammars.schemas import PreparedSchema, SchemaOptions, prepare_schema
from aioengine.request import TokenConstraint

if TYPE_CHECKING:
    from aioengine.runtime.client import EngineClient

logger = logging.getLogger("aioengine.guided")

T = TypeVar("T")

SCHEMA_SIZE = 2**15
"""Reading a schema counts as a text of so many characters."""


class Guide:
    """Makes constraints for one engine's model. One is enough for all requests.

    >>> guide = Guide(engine)
    >>> constraint = await guide.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
    >>> await engine.complete("...", SamplingParams(constraint=constraint))

    Grammars are compiled and followed in a process that ends with the engine, within ``limits``; compiled
    ones are kept. The methods may be cancelled. Tenants (``tenant``) take turns when many grammars wait to be
    compiled.

    Raises ConfigError if llguidance is not installed, the model has no tokenizer, or the system is Windows.
    The methods raise RequestInvalid for a grammar that is malformed, uses a feature that llguidance does not
    support, or takes more time or memory than ``limits`` allows; EngineOverloaded if too many are waiting or
    in use; EngineStopped.
    """

    def __init__(self, engine: EngineClient, *, limits: GrammarLimits | None = None) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError("guided decoding needs llguidance: pip install 'aioengine[guided]'") from error
        if sys.platform == "win32":
            raise ConfigError("guided decoding needs processes that can be forked: Linux or macOS")
        if engine.tokenizer is None:
            raise ConfigError(f"guided decoding needs a tokenizer, and {engine.config.model} has none")
        self._tokenizer = engine.tokenizer
        self._from = llguidance.LLMatcher
        self._grammars = engine.grammars(limits)
        self._text_work = engine.text_work

    async def in_thread(self, work: Callable[[], T], tenant: str | None = None) -> T:
        """Run ``work()``, which makes a grammar's text, in a thread for texts, where tenants take turns.
        Raises what ``work`` raises, and EngineStopped."""
        return await self._text_work.run(SCHEMA_SIZE, work, tenant)

    async def json_object(
        self, options: SchemaOptions | None = None, *, tenant: str | None = None
    ) -> TokenConstraint:
        """Constrain the output to any JSON object."""
        return await self.json_schema({"type": "object"}, options, tenant=tenant)

    async def json_schema(
        self,
        schema: Mapping[str, Any] | str,
        options: SchemaOptions | None = None,
        *,
        tenant: str | None = None,
    ) -> TokenConstraint:
        """Constrain the output to JSON that conforms to ``schema``, by default compact and without undeclared
        properties."""
        chosen = options or SchemaOptions()
        prepared = await self.in_thread(lambda: prepare_schema(schema, chosen), tenant)
        if prepared.not_enforced:
            logger.warning("a JSON schema's %s: not enforced", ", ".join(prepared.not_enforced))
        return await self.prepared_schema(prepared, tenant=tenant)

    async def prepared_schema(self, schema: PreparedSchema, *, tenant: str | None = None) -> TokenConstraint:
        """Constrain the output to a schema that :func:`~aioengine.grammars.schemas.prepare_schema`
        returned."""
        text = schema.text
        return await self._constraint(text, lambda: self._from.grammar_from_json_schema(text), tenant)

    async def regex(self, pattern: str, *, tenant: str | None = None) -> TokenConstraint:
        """Constrain the output to text that matches a regular expression (in Rust's syntax) as a whole."""
        return await self._constraint(pattern, lambda: self._from.grammar_from_regex(pattern), tenant)

    async def choice(self, options: Sequence[str], *, tenant: str | None = None) -> TokenConstraint:
        """Constrain the output to one of these texts."""
        if not options:
            raise RequestInvalid("choice=[]: must have at least one text")
        self._grammars.check_size(options)
        marks = self._tokenizer.text_tokens
        grammar = await self.in_thread(lambda: _choice_grammar(options, marks), tenant)
        return await self.lark(grammar, tenant=tenant)

    async def lark(self, grammar: str, *, tenant: str | None = None) -> TokenConstraint:
        """Constrain the output to a context-free grammar in Lark's notation, from its rule ``start``."""
        return await self._constraint(grammar, lambda: self._from.grammar_from_lark(grammar), tenant)

    async def another(self, constraint: TokenConstraint, *, tenant: str | None = None) -> TokenConstraint:
        """Make a constraint for the same grammar as one that this guide has made, with less work."""
        return await self._grammars.constraint(constraint.text, tenant)  # type: ignore[attr-defined] # they made it

    async def _constraint(self, text: str, grammar: Callable[[], str], tenant: str | None) -> TokenConstraint:
        self._grammars.check_size((text,))  # before any work on it
        try:
            whole = grammar()
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestInvalid(f"the grammar is malformed: {error}") from error
        return await self._grammars.constraint(whole, tenant)


def _choice_grammar(options: Sequence[str], marks: Mapping[str, int]) -> str:
    """Write options as a grammar in Lark's notation. ``marks`` has the ids of texts that are tokens of their
    own, such as "<think>": each may come as that token, which is how a model writes it, or letter by letter.
    """
    # Lengths of the marks that begin with a character, the longest first.
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for size, first in sorted({(len(mark), mark[0]) for mark in marks if mark}, reverse=True):
        sizes[first].append(size)
    firsts = re.compile(f"[{re.escape(''.join(sizes))}]" if sizes else "(?!)")
    rules: dict[str, str] = {}

    def parts(text: str) -> Iterator[str]:
        """Split the text at its marks, of which there may be thousands, in time linear in the text."""
        at = 0
        for found in firsts.finditer(text):
            begin = found.start()
            ends = (begin + size for size in sizes[found[0]])
            end = next((end for end in ends if begin >= at and text[begin:end] in marks), None)
            if end is not None:
                yield text[at:begin]
                yield text[begin:end]
                at = end
        yield text[at:]

    def terminal(part: str) -> str:
        if part not in marks:
            return json.dumps(part)
        rules[f"mark_{marks[part]}"] = f"<[{marks[part]}]> | {json.dumps(part)}"
        return f"mark_{marks[part]}"

    written = [" ".join(terminal(part) for part in parts(text) if part) or '""' for text in options]
    return "\n".join(["start: " + " | ".join(written), *(f"{name}: {rule}" for name, rule in rules.items())])
