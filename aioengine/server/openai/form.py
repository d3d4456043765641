"""The form of an answer: a JSON schema, a grammar, or calls of tools.

How models write calls is in ``formats/``. With ``tool_choice`` "required" or a named function a constraint
holds the answer to calls in the model's own format, or, if that is not known, in JSON of a known shape.

A call is sent when it is complete, whatever the rest of the answer is. A call that is cut off is not sent,
because its arguments are no JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

from aioengine.errors import RequestInvalid
from aioengine.grammars.budget import SchemaBudget
from aioengine.grammars.schemas import PreparedSchema, SchemaOptions, arguments_schema, prepare_schema
from aioengine.guided import SCHEMA_SIZE, Guide
from aioengine.request import TokenConstraint
from aioengine.server.errors import invalid, needed
from aioengine.server.formats.calls import AnswerFormats, CallText
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
            wanted, not_enforced = await guide.text_work.run(SCHEMA_SIZE, self.write, tenant)
            return [await self.compile(guide, wanted, tenant=tenant) for _ in range(count)], not_enforced
        except RequestInvalid as error:
            raise invalid(self.param, str(error)) from error


class ToolPlan(NamedTuple):
    """Plan that follows from a request's ``tools``, ``tool_choice`` and ``parallel_tool_calls``."""

    tools: list[api.Tool]
    """Tools that may be called; empty where none may be."""
    places: Sequence[int]
    """Their indices in the request."""
    forced: int | None = None
    """Index of a tool that must be called once."""
    required: bool = False
    """Some tool must be called."""
    parallel: bool | None = None

    @property
    def is_free(self) -> bool:
        """Whether the model may answer with text."""
        return self.forced is None and not self.required

    def form(self, options: SchemaOptions, formats: AnswerFormats) -> Form:
        """Return the form of an answer that must be calls."""
        [first, *others] = self._callable
        param = "tools" if others else f"tools[{self.places[first]}].function.parameters"
        written, tokens = formats.written, formats.tokens
        return Form(param, Guide.lark, lambda: self.grammar(options, written, tokens))

    @property
    def _callable(self) -> Sequence[int]:
        return range(len(self.tools)) if self.forced is None else (self.forced,)

    def grammar(
        self, options: SchemaOptions, written: CallText, tokens: Mapping[str, int]
    ) -> tuple[str, Sequence[str]]:
        """Grammar of the answer if calls are required, in Lark's notation, and what is not enforced.
        ``tokens`` as in :meth:`CallText.grammar`.

        Raises ApiError that names the tool.
        """
        names: list[str] = []
        prepared: list[PreparedSchema] = []
        budget = SchemaBudget()
        for place in self._callable:
            function = self.tools[place].function
            schema, chosen = arguments_schema(function.parameters), options.for_strict(function.strict)
            names.append(function.name)
            try:
                prepared.append(prepare_schema(schema, chosen, budget))
            except RequestInvalid as error:
                param = f"tools[{self.places[place]}].function.parameters"
                raise invalid(param, str(error)) from error
        is_parallel = bool(self.parallel) and self.forced is None
        grammar = written.grammar(names, [schema.text for schema in prepared], tokens, parallel=is_parallel)
        return grammar, tuple(dict.fromkeys(each for schema in prepared for each in schema.not_enforced))


def plan_tools(
    tools: Sequence[api.Tool] | None, choice: api.ToolChoice | None = None, parallel: bool | None = None
) -> ToolPlan:
    """Make the plan. Raises ApiError if ``choice`` does not fit ``tools``."""
    if not tools and choice not in (None, "none", "auto"):
        raise invalid("tool_choice", "there are no tools to choose from")
    if choice == "none" or not tools:
        return ToolPlan([], ())
    mode, wanted = choice, list[api.NamedTool]()
    if isinstance(choice, api.AllowedTools):
        mode, wanted = choice.allowed_tools.mode, choice.allowed_tools.tools
    elif isinstance(choice, api.NamedTool):
        wanted = [choice]
    names, chosen = [tool.function.name for tool in tools], {tool.function.name for tool in wanted}
    for name in chosen.difference(names):
        raise invalid("tool_choice", f"there is no tool {name[:100]!r}")
    if isinstance(choice, api.NamedTool):
        return ToolPlan(list(tools), range(len(tools)), names.index(choice.function.name), parallel=parallel)
    places = [place for place, name in enumerate(names) if name in chosen or not chosen]
    return ToolPlan([tools[i] for i in places], places, required=mode == "required", parallel=parallel)


def wanted_form(
    fields: api.GenerationFields, options: SchemaOptions, calls: Form | None = None
) -> Form | None:
    """Return the form of a request's answers; None if they are unconstrained. If they must be ``calls``,
    ``response_format`` has no effect, as in OpenAI's API: some clients send both. Raises ApiError if the
    request asks for two forms, or for one that ``ignore_eos`` contradicts."""
    found: list[tuple[str, Form]] = []
    wanted = fields.response_format
    if wanted is not None and wanted.type != "text" and calls is None:
        found.append(("response_format", _of_format(wanted, options)))
    if fields.structured_outputs is not None:
        found.append(("structured_outputs", _of_outputs(fields.structured_outputs, options)))
    if calls is not None:
        found.append(("tool_choice", calls))
    if not found:
        return None
    field, form = found[0]
    if len(found) > 1:
        raise invalid(found[1][0], f"not together with {field}; leave one of them out")
    if fields.ignore_eos:
        raise invalid("ignore_eos", f"not with {field}, which decides where the answer ends; leave it out")
    return form


def _of_format(wanted: api.ResponseFormat, options: SchemaOptions) -> Form:
    if wanted.type == "json_object":
        return _of_schema("response_format", {"type": "object"}, options)
    given = needed(wanted.json_schema, "response_format.json_schema")
    schema = needed(given.schema, "response_format.json_schema.schema")
    return _of_schema("response_format", schema, options.for_strict(given.strict))


_KINDS: dict[str, Compile] = {"regex": Guide.regex, "choice": Guide.choice, "grammar": Guide.lark}


def _of_outputs(wanted: api.StructuredOutputs, options: SchemaOptions) -> Form:
    given = {name: getattr(wanted, name) for name in ("json", *_KINDS)}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise invalid("structured_outputs", "give exactly one of json, regex, choice and grammar")
    [(name, value)] = given.items()
    if name == "json":
        return _of_schema("structured_outputs", value, options)
    return Form("structured_outputs", _KINDS[name], lambda: (value, ()))


def _of_schema(param: str, schema: api.Schema | str, options: SchemaOptions) -> Form:
    def write() -> tuple[PreparedSchema, Sequence[str]]:
        if isinstance(schema, str):
            check_counts(schema.encode(), param)
        prepared = prepare_schema(schema, options)
        return prepared, prepared.not_enforced

    return Form(param, Guide.prepared_schema, write)
