"""Guided decoding: constraints from JSON schemas, regular expressions and grammars (extra ``guided``)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aioengine.errors import ConfigError, RequestInvalid
from aioengine.grammars.limits import GrammarLimits
from aioengine.grammars.schemas import PreparedSchema, SchemaOptions, prepare_schema
from aioengine.request import TokenConstraint

if TYPE_CHECKING:
    from aioengine.runtime.client import EngineClient

logger = logging.getLogger("aioengine.guided")

SCHEMA_SIZE = 2**15
"""Reading a schema counts as a text of so many characters."""


class Guide:
    """Makes constraints for one engine's model. One is enough for all requests.

    >>> guide = Guide(engine)
    >>> constraint = await guide.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
    >>> await engine.complete("...", SamplingParams(constraint=constraint))

    Grammars are compiled and followed in a process that ends with the engine, within ``limits``; compiled
    ones are kept, and tenants (``tenant``) take turns. Raises ConfigError if llguidance is not installed, or
    the model has no tokenizer. The methods raise RequestInvalid for a grammar that is
    malformed, not supported by llguidance, or beyond ``limits``; EngineOverloaded if too many are waiting or
    in use; EngineStopped.
    """

    def __init__(self, engine: EngineClient, *, limits: GrammarLimits | None = None) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError("guided decoding needs llguidance: pip install 'aioengine[guided]'") from error
        if engine.tokenizer is None:
            raise ConfigError(f"guided decoding needs a tokenizer, and {engine.config.model} has none")
        self._from = llguidance.LLMatcher
        self._grammars = engine.grammars(limits)
        self.text_work = engine.text_work

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
        prepared = await self.text_work.run(SCHEMA_SIZE, lambda: prepare_schema(schema, chosen), tenant)
        if prepared.not_enforced:
            logger.warning("a JSON schema's %s: not enforced", ", ".join(prepared.not_enforced))
        return await self.prepared_schema(prepared, tenant=tenant)

    async def prepared_schema(self, schema: PreparedSchema, *, tenant: str | None = None) -> TokenConstraint:
        """Constrain the output to a schema that :func:`~aioengine.grammars.schemas.prepare_schema`
        returned."""
        return await self._constraint(schema.text, self._from.grammar_from_json_schema, tenant)

    async def regex(self, pattern: str, *, tenant: str | None = None) -> TokenConstraint:
        """Constrain the output to text that matches a regular expression (in Rust's syntax) as a whole."""
        return await self._constraint(pattern, self._from.grammar_from_regex, tenant)

    async def choice(self, options: Sequence[str], *, tenant: str | None = None) -> TokenConstraint:
        """Constrain the output to one of these texts."""
        if not options:
            raise RequestInvalid("choice=[]: must have at least one text")
        self._grammars.limits.check_characters(options)
        return await self.lark(f"start: {' | '.join(map(json.dumps, options))}", tenant=tenant)

    async def lark(self, grammar: str, *, tenant: str | None = None) -> TokenConstraint:
        """Constrain the output to a context-free grammar in Lark's notation, from its rule ``start``."""
        return await self._constraint(grammar, self._from.grammar_from_lark, tenant)

    async def _constraint(
        self, text: str, grammar_from: Callable[[str], str], tenant: str | None
    ) -> TokenConstraint:
        self._grammars.limits.check_characters((text,))  # before any work on it
        try:
            grammar = grammar_from(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestInvalid(f"the grammar is malformed: {error}") from error
        return await self._grammars.constraint(grammar, tenant)
