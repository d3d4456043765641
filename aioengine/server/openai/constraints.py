"""Derives an answer's form from ``response_format``, ``structured_outputs`` and ``tool_choice``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec

from aioengine.errors import RequestInvalid
from aioengine.grammars.schemas import PreparedSchema, SchemaOptions, prepare_schema
from aioengine.guided import Guide
from aioengine.request import TokenConstraint
from aioengine.server.errors import ApiError
from aioengine.server.formats.registry import NO_FORMATS, AnswerFormats
from aioengine.server.openai.api import GenerationFields, ResponseFormat, StructuredOutputs
from aioengine.server.openai.tools import ToolPlan
from aioengine.server.transport.bounded_json import check_counts


class Compile(Protocol):
    """A method of Guide."""

    def __call__(
        self, guide: Guide, wanted: Any, /, *, tenant: str | None
    ) -> Coroutine[Any, Any, TokenConstraint]: ...


class Form:
    """A form that an answer must conform to. What a client has sent for it is kept no longer than it takes
    to build the first constraint: it may be large, and an answer may take minutes.

    Args:
        param: The request's field that asks for it.
        compile: Builds a choice's constraint.
        write: Returns the input of ``compile``, and the requirements that are not enforced. Called once, in a
            thread. Raises RequestInvalid.
        blame: Finds a more exact ``param`` in the reason for which ``compile`` refused the form; None:
            ``param``.
    """

    def __init__(
        self,
        param: str,
        compile: Compile,
        write: Callable[[], tuple[Any, Sequence[str]]],
        blame: Callable[[str], str | None] = lambda _reason: None,
    ) -> None:
        self.param = param
        self._compile = compile
        self._write: Callable[[], tuple[Any, Sequence[str]]] | None = write
        self._blame = blame
        self._first: TokenConstraint | None = None
        self.not_enforced: Sequence[str] = ()
        """Requirements that are not enforced; known once a constraint was built."""

    async def constraint(self, guide: Guide, tenant: str | None) -> TokenConstraint:
        """Build a constraint for one choice, one after the other. Raises an ApiError that names the field."""
        try:
            if self._first is not None:
                return await guide.another(self._first, tenant=tenant)
            assert self._write is not None
            wanted, self.not_enforced = await guide.in_thread(self._write, tenant)
            self._first = await self._compile(guide, wanted, tenant=tenant)
            self._write = None
            return self._first
        except RequestInvalid as error:
            param = self._blame(str(error)) or self.param
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from error


def wanted_form(
    fields: GenerationFields,
    options: SchemaOptions,
    response_format: ResponseFormat | None = None,
    tools: ToolPlan | None = None,
    formats: AnswerFormats = NO_FORMATS,
) -> Form | None:
    """Return the form of a request's answers; None if they are unconstrained. Where the answer must be calls,
    ``response_format`` has no effect, as in OpenAI's API: some clients send both. Raises ApiError if the
    request asks for two forms, or for one that ``ignore_eos`` contradicts."""
    found: dict[str, Form] = {}
    if response_format is not None and response_format.type != "text":
        found["response_format"] = _of_format(response_format, options)
    if fields.structured_outputs is not None:
        found["structured_outputs"] = _of_outputs(fields.structured_outputs, options)
    older = StructuredOutputs(
        json=fields.guided_json,
        regex=fields.guided_regex,
        choice=fields.guided_choice,
        grammar=fields.guided_grammar,
    )
    if older != StructuredOutputs():
        form = _of_outputs(older, options, "guided_{}")
        found[form.param] = form
    if tools is not None and not tools.is_free:
        found.pop("response_format", None)  # a format of the text, and calls have none
        found["tool_choice"] = _of_tools(tools, options, formats)
    if len(found) > 1:
        first, second, *_ = found
        raise ApiError(400, f"{first} and {second} cannot both hold", param=second, code="invalid_value")
    if found and fields.ignore_eos:
        raise ApiError(
            400,
            f"ignore_eos: not with {next(iter(found))}, which decides where the answer ends; leave it out",
            param="ignore_eos",
            code="invalid_value",
        )
    return next(iter(found.values()), None)


def json_form(param: str, schema: Any, options: SchemaOptions) -> Form:
    def write() -> tuple[PreparedSchema, Sequence[str]]:
        if isinstance(schema, str):
            check_counts(schema.encode(), param)
        prepared = prepare_schema(schema, options)
        return prepared, prepared.not_enforced

    return Form(param, Guide.prepared_schema, write)


def _of_format(wanted: ResponseFormat, options: SchemaOptions) -> Form:
    if wanted.type == "json_object":
        return json_form("response_format", {"type": "object"}, options)
    json_schema = wanted.json_schema
    if json_schema is None or json_schema.schema is None:
        raise ApiError(
            400,
            "response_format: json_schema.schema is missing",
            param="response_format.json_schema.schema",
            code="invalid_value",
        )
    return json_form("response_format", json_schema.schema, options.for_strict(json_schema.strict))


def _of_outputs(wanted: StructuredOutputs, options: SchemaOptions, param: str = "structured_outputs") -> Form:
    """Return the form that ``wanted`` describes. ``{}`` in ``param`` stands for the kind of form."""
    found: list[Form] = []
    if (schema := wanted.json) is not None:
        if wanted.disable_any_whitespace is not None:
            options = msgspec.structs.replace(options, any_whitespace=not wanted.disable_any_whitespace)
        if wanted.disable_additional_properties is not None:
            is_open = not wanted.disable_additional_properties
            options = msgspec.structs.replace(options, open_objects=is_open)
        found.append(json_form(param.format("json"), schema, options))
    if (pattern := wanted.regex) is not None:
        found.append(Form(param.format("regex"), Guide.regex, lambda: (pattern, ())))
    if (choices := wanted.choice) is not None:
        found.append(Form(param.format("choice"), Guide.choice, lambda: (choices, ())))
    if (grammar := wanted.grammar) is not None:
        found.append(Form(param.format("grammar"), Guide.lark, lambda: (grammar, ())))
    if len(found) != 1:
        given = ", ".join(dict.fromkeys(form.param for form in found)) or param
        raise ApiError(
            400,
            f"{given}: give exactly one of json, regex, choice and grammar",
            param=found[-1].param if found else param,
            code="invalid_value",
        )
    return found[0]


def _of_tools(plan: ToolPlan, options: SchemaOptions, formats: AnswerFormats) -> Form:
    if plan.forced is not None:
        param = f"tools[{plan.place(plan.forced)}].function.parameters"
        if formats.written is None:
            return Form(param, Guide.prepared_schema, lambda: plan.forced_schema(options))
        plan = plan.only(plan.forced)
    else:
        param = "tools"
    return Form(
        param, Guide.lark, lambda: plan.grammar(options, formats.required, formats.tokens), plan.blame
    )
