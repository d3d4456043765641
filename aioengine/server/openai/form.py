"""The form of an answer: a JSON schema, a grammar, or calls of tools.

How models write calls is in ``formats/``. With ``tool_choice`` "required" or a named function a constraint
holds the answer to calls in the model's own format, or, if that is not known, in JSON of a known shape.

A call is sent when it is complete, whatever the rest of the answer is. A call that is cut off is not sent,
because its arguments are no JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from aioengine.errors import RequestInvalid
from aioengine.grammars.budget import SchemaBudget
from aioengine.grammars.schemas import PreparedSchema, SchemaOptions, arguments_schema, prepare_schema
from aioengine.guided import Guide
from aioengine.request import SamplingParams, TokenConstraint
from aioengine.server.errors import invalid
from aioengine.server.formats.calls import (
    JSON_TEXT,
    REASONING,
    TOOLS,
    CallText,
    Read,
    harmony,
    json_calls,
    plain,
    think,
)
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai import api
from aioengine.server.transport.body import check_counts

Compile = Callable[..., Coroutine[Any, Any, TokenConstraint]]
"""A method of Guide: it takes the guide, what is wanted, and the ``tenant``."""


class Form(NamedTuple):
    """A form that an answer must conform to. It has what a client has sent for it, which may be large."""

    param: str
    """The request's field that asks for it."""
    compile: Compile
    """Builds a constraint."""
    write: Callable[[], tuple[Any, Sequence[str]]]
    """Returns the input of ``compile``, and the requirements that are not enforced. Called once, in a thread.
    Raises RequestInvalid."""

    async def constraints(
        self, guide: Guide, tenant: str | None, count: int
    ) -> tuple[list[TokenConstraint], Sequence[str]]:
        """Build constraints for so many choices, one after the other. Also returns the requirements that are
        not enforced. Raises an ApiError that names the field."""
        try:
            wanted, not_enforced = await guide.in_thread(self.write, tenant)
            return [await self.compile(guide, wanted, tenant=tenant) for _ in range(count)], not_enforced
        except RequestInvalid as error:
            raise invalid(self.param, str(error)) from error


class AnswerFormats(NamedTuple):
    """Formats of a model's answers."""

    tools: str | None
    reasoning: str | None
    written: CallText | None = None
    """Form in which the model writes calls; None if that is not known."""
    tokens: Mapping[str, int] = MappingProxyType({})
    """Texts that are tokens of their own, and their ids."""

    @classmethod
    def chosen(
        cls, chat_template: str | None, tools: str, reasoning: str, tokens: Mapping[str, int] | None = None
    ) -> AnswerFormats:
        """Choose formats by name. "auto" is the format that the chat template shows, "none" is none."""
        template = chat_template or ""

        def choose(name: str, known: Mapping[str, tuple[str, ...]]) -> str | None:
            if name == "auto":
                shown = (own for own, texts in known.items() if all(text in template for text in texts))
                return next(shown, None)
            return None if name == "none" else name

        tool = choose(tools, {name: known.shown_by for name, known in TOOLS.items()})
        texts = {} if tool is None else TOOLS[tool].written
        written = next((text for shown, text in texts.items() if shown in template), None)
        return cls(tool, choose(reasoning, REASONING), written, tokens or {})

    @property
    def required(self) -> CallText:
        """Form of required calls: in the model's format, or else in this server's JSON."""
        return self.written or JSON_TEXT

    def needs_special_tokens(self, with_tools: bool) -> bool:
        """Whether an answer's text must have its special tokens."""
        is_harmony = "harmony" in (self.tools, self.reasoning)
        return is_harmony or (with_tools and self.tools is not None and TOOLS[self.tools].special)

    def free(self, names: frozenset[str], *, single: bool, is_thinking: bool) -> AnswerParser | None:
        """Make a parser for an answer without a constraint; None if there is nothing to look for.
        ``is_thinking`` says whether the prompt has begun the model's reasoning."""
        if "harmony" in (self.tools, self.reasoning):
            known = names if self.tools == "harmony" else frozenset[str]()
            return AnswerParser(harmony(known, self.reasoning == "harmony"), single=single)
        read: Read = plain
        if names and self.tools is not None:
            read = TOOLS[self.tools].read(names)
        elif self.reasoning is None:
            return None
        if self.reasoning == "think":
            read = think(read, is_open=is_thinking)
        return AnswerParser(read, single=single)

    def held(self, names: frozenset[str], *, single: bool) -> AnswerParser:
        """Make a parser for an answer that a grammar of :attr:`required` holds to calls."""
        if self.written is not None and self.tools is not None:
            return AnswerParser(TOOLS[self.tools].read(names), single=single)
        return AnswerParser(json_calls, single=single)


NO_FORMATS = AnswerFormats(None, None)


class ToolPlan(NamedTuple):
    """Plan that follows from a request's ``tools``, ``tool_choice`` and ``parallel_tool_calls``."""

    tools: list[api.Tool]
    """Tools that may be called; the model is shown no others."""
    places: list[int]
    """Index of each in the request's ``tools``."""
    forced: str | None = None
    """A tool that must be called once."""
    required: bool = False
    """Some tool must be called."""
    parallel: bool | None = None

    @property
    def is_free(self) -> bool:
        """Whether the model may answer with text."""
        return self.forced is None and not self.required

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.tools]

    def form(self, options: SchemaOptions, formats: AnswerFormats) -> Form:
        """Return the form of an answer that must be calls."""
        plan = self
        if self.forced is not None:
            at = self.names.index(self.forced)
            plan = self._replace(tools=[self.tools[at]], places=[self.places[at]], parallel=False)
        param = "tools" if len(plan.tools) > 1 else f"tools[{plan.places[0]}].function.parameters"
        written, tokens = formats.required, formats.tokens
        return Form(param, Guide.lark, lambda: plan.grammar(options, written, tokens))

    def grammar(
        self, options: SchemaOptions, written: CallText, tokens: Mapping[str, int]
    ) -> tuple[str, Sequence[str]]:
        """Grammar of the answer if calls are required, in Lark's notation, and what is not enforced.
        ``tokens`` as in :meth:`CallText.grammar`.

        Raises ApiError that names the tool.
        """
        prepared: list[PreparedSchema] = []
        budget = SchemaBudget()
        for place, tool in zip(self.places, self.tools, strict=True):
            try:
                prepared.append(_arguments(tool, options, budget))
            except RequestInvalid as error:
                raise invalid(f"tools[{place}].function.parameters", str(error)) from error
        schemas = [schema.text for schema in prepared]
        grammar = written.grammar(self.names, schemas, tokens, parallel=bool(self.parallel))
        return grammar, tuple(dict.fromkeys(each for schema in prepared for each in schema.not_enforced))

    def parser(self, formats: AnswerFormats, *, is_thinking: bool) -> AnswerParser | None:
        """Make the parser for one answer; None if nothing is looked for. ``is_thinking`` says that the prompt
        has begun the model's reasoning, and that no constraint keeps the answer from going on with it."""
        single = self.forced is not None or self.parallel is False
        if self.is_free:
            return formats.free(frozenset(self.names), single=single, is_thinking=is_thinking)
        return formats.held(frozenset(self.names), single=single)

    def sampling(self, params: SamplingParams, formats: AnswerFormats) -> SamplingParams:
        """Return ``params``, changed so that the answer's text has what parsers look for."""
        if formats.needs_special_tokens(bool(self.tools)):
            return msgspec.structs.replace(params, skip_special_tokens=False)
        return params


def plan_tools(
    tools: Sequence[api.Tool] | None, choice: api.ToolChoice | None = None, parallel: bool | None = None
) -> ToolPlan:
    """Make the plan. Raises ApiError if ``choice`` does not fit ``tools``."""
    functions = list(tools or ())
    if not functions and choice not in (None, "none", "auto"):
        raise invalid("tool_choice", "there are no tools to choose from")
    if choice == "none" or not functions:
        return ToolPlan([], [])
    plan = ToolPlan(functions, list(range(len(functions))), required=choice == "required", parallel=parallel)
    if isinstance(choice, str) or choice is None:
        return plan
    named = [choice] if isinstance(choice, api.NamedTool) else choice.allowed_tools.tools
    wanted = [tool.function.name for tool in named]
    for name in wanted:
        if name not in plan.names:
            raise invalid("tool_choice", f"there is no tool {name[:100]!r}")
    if isinstance(choice, api.NamedTool):
        return plan._replace(forced=wanted[0])
    places = [place for place, name in enumerate(plan.names) if name in wanted]
    is_required = choice.allowed_tools.mode == "required"
    return plan._replace(tools=[functions[i] for i in places], places=places, required=is_required)


def _arguments(tool: api.Tool, options: SchemaOptions, budget: SchemaBudget) -> PreparedSchema:
    function = tool.function
    return prepare_schema(arguments_schema(function.parameters), options.for_strict(function.strict), budget)


def wanted_form(
    fields: api.GenerationFields,
    options: SchemaOptions,
    tools: ToolPlan | None = None,
    formats: AnswerFormats = NO_FORMATS,
) -> Form | None:
    """Return the form of a request's answers; None if they are unconstrained. Where the answer must be calls,
    ``response_format`` has no effect, as in OpenAI's API: some clients send both. Raises ApiError if the
    request asks for two forms, or for one that ``ignore_eos`` contradicts."""
    found: list[tuple[str, Form]] = []
    must_call = tools is not None and not tools.is_free
    wanted = fields.response_format
    if wanted is not None and wanted.type != "text" and not must_call:
        found.append(("response_format", _of_format(wanted, options)))
    if fields.structured_outputs is not None:
        found.append(("structured_outputs", _of_outputs(fields.structured_outputs, options)))
    if must_call and tools is not None:
        found.append(("tool_choice", tools.form(options, formats)))
    if not found:
        return None
    field, form = found[0]
    if len(found) > 1:
        raise invalid(found[1][0], f"not together with {field}; leave one of them out")
    if fields.ignore_eos:
        raise invalid("ignore_eos", f"not with {field}, which decides where the answer ends; leave it out")
    return form


def _of_format(wanted: api.ResponseFormat, options: SchemaOptions) -> Form:
    schema: api.Schema | None = {"type": "object"}
    if wanted.type == "json_schema":
        given = wanted.json_schema
        schema = None if given is None else given.schema
        options = options if given is None else options.for_strict(given.strict)
    if schema is None:
        raise invalid("response_format.json_schema.schema", "is missing")
    return _of_schema("response_format", lambda: prepare_schema(schema, options))


def _of_schema(param: str, prepare: Callable[[], PreparedSchema]) -> Form:
    def write() -> tuple[PreparedSchema, Sequence[str]]:
        prepared = prepare()
        return prepared, prepared.not_enforced

    return Form(param, Guide.prepared_schema, write)


_KINDS: dict[str, Compile] = {"regex": Guide.regex, "choice": Guide.choice, "grammar": Guide.lark}


def _of_outputs(wanted: api.StructuredOutputs, options: SchemaOptions) -> Form:
    given = {name: getattr(wanted, name) for name in ("json", *_KINDS)}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise invalid("structured_outputs", "give exactly one of json, regex, choice and grammar")
    [(name, value)] = given.items()
    field = "structured_outputs"
    if name != "json":
        return Form(field, _KINDS[name], lambda: (value, ()))

    def prepare() -> PreparedSchema:
        if isinstance(value, str):
            check_counts(value.encode(), field)
        return prepare_schema(value, options)

    return _of_schema(field, prepare)
