"""Tools that a request lets the model call, and whether it must call one.

How models write calls is in ``formats/``. With ``tool_choice`` "required" or a named function a constraint
holds the answer to calls in the model's own format, or, if that is not known, in JSON of a known shape.

A call is sent when it is complete, whatever the rest of the answer is. A call that is cut off is not sent,
because its arguments are no JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from aioengine.errors import RequestInvalid
from aioengine.grammars.limits import SchemaBudget
from aioengine.grammars.schemas import PreparedSchema, SchemaOptions, arguments_schema, prepare_schema
from aioengine.request import SamplingParams
from aioengine.server.errors import ApiError
from aioengine.server.formats.call_text import FIRST_ARGUMENTS, CallText
from aioengine.server.formats.registry import AnswerFormats, arguments_parser
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai import chat_api

_LINE = re.compile(r"\bat (\d+)\(\d+\)")


class ToolPlan(NamedTuple):
    """Plan that follows from a request's ``tools``, ``tool_choice`` and ``parallel_tool_calls``."""

    tools: list[chat_api.Tool]
    """Tools that may be called; the model is shown no others."""
    places: list[int]
    """Index of each in the request's ``tools``."""
    forced: str | None = None
    """A function that must be called."""
    required: bool = False
    """Some function must be called."""
    parallel: bool | None = None

    @property
    def is_free(self) -> bool:
        """Whether the model may answer with text."""
        return self.forced is None and not self.required

    def place(self, name: str) -> int:
        """Index in the request's ``tools``."""
        return next(p for p, tool in zip(self.places, self.tools, strict=True) if tool.function.name == name)

    def forced_schema(self, options: SchemaOptions) -> tuple[PreparedSchema, Sequence[str]]:
        """Schema of the answer if ``forced``, and what is not enforced. Raises RequestInvalid."""
        tool = next(tool for tool in self.tools if tool.function.name == self.forced)
        prepared = _arguments(tool, options, SchemaBudget())
        return prepared, prepared.not_enforced

    def grammar(
        self, options: SchemaOptions, written: CallText, tokens: Mapping[str, int]
    ) -> tuple[str, Sequence[str]]:
        """Grammar of the answer if calls are required, in Lark's notation, and what is not enforced.
        ``tokens`` as in :meth:`CallText.grammar`.

        Raises ApiError that names the tool.
        """
        schemas = []
        not_enforced: dict[str, None] = {}
        budget = SchemaBudget()
        for place, tool in zip(self.places, self.tools, strict=True):
            try:
                prepared = _arguments(tool, options, budget)
            except RequestInvalid as error:
                param = f"tools[{place}].function.parameters"
                raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from error
            not_enforced.update(dict.fromkeys(prepared.not_enforced))
            schemas.append(prepared.text)
        names = [tool.function.name for tool in self.tools]
        grammar = written.grammar(names, schemas, tokens, parallel=bool(self.parallel))
        return grammar, tuple(not_enforced)

    def blame(self, reason: str) -> str | None:
        """Return the field whose part of the grammar was refused for ``reason``; None if it is not known."""
        found = _LINE.search(reason)
        index = int(found[1]) - FIRST_ARGUMENTS if found else -1
        return f"tools[{self.places[index]}].function.parameters" if 0 <= index < len(self.tools) else None

    def only(self, name: str) -> ToolPlan:
        """Return the plan with one tool, for exactly one call."""
        at = next(i for i, tool in enumerate(self.tools) if tool.function.name == name)
        return self._replace(tools=[self.tools[at]], places=[self.places[at]], parallel=False)

    def parser(self, formats: AnswerFormats, *, is_thinking: bool) -> AnswerParser | None:
        """Make the parser for one answer; None if nothing is looked for. ``is_thinking`` says that the prompt
        has begun the model's reasoning, and that no constraint keeps the answer from going on with it."""
        names = frozenset(tool.function.name for tool in self.tools)
        if self.forced is not None:
            written = formats.written
            return arguments_parser(self.forced) if written is None else formats.held(names, single=True)
        single = self.parallel is False
        if self.required:
            return formats.held(names, single=single)
        return formats.free(names, single=single, is_thinking=is_thinking)

    def sampling(self, params: SamplingParams, formats: AnswerFormats) -> SamplingParams:
        """Return ``params``, changed so that the answer's text has what parsers look for. An answer without a
        constraint ends with its first call, if only one is allowed."""
        if formats.needs_special_tokens(bool(self.tools)):
            params = msgspec.structs.replace(params, skip_special_tokens=False)
        if self.parallel is False and self.is_free and self.tools and formats.closing is not None:
            params = msgspec.structs.replace(params, stop=(*params.stop, formats.closing))
        return params


def plan_tools(
    tools: Sequence[chat_api.Tool | chat_api.CustomTool] | None,
    choice: chat_api.ToolChoice | None = None,
    parallel: bool | None = None,
) -> ToolPlan:
    """Make the plan. Raises ApiError for custom tools, and if ``choice`` does not fit ``tools``."""
    functions: list[chat_api.Tool] = []
    for i, tool in enumerate(tools or ()):
        if isinstance(tool, chat_api.CustomTool):
            raise ApiError(
                400,
                f"tools[{i}]: type 'custom' is not supported; use a function that takes a text",
                param=f"tools[{i}].type",
                code="unsupported_parameter",
            )
        functions.append(tool)
    if not functions:
        if choice is not None and choice not in ("none", "auto"):
            raise _choice_error("there are no tools to choose from")
        return ToolPlan([], [])
    names = [tool.function.name for tool in functions]
    plan = ToolPlan(functions, list(range(len(functions))), parallel=parallel)
    if isinstance(choice, chat_api.NamedCustomTool):
        raise _choice_error("tools of type 'custom' are not supported")
    if isinstance(choice, chat_api.NamedTool):
        _check_known(choice, names)
        return plan._replace(forced=choice.function.name)
    if isinstance(choice, chat_api.AllowedTools):
        for named in choice.allowed_tools.tools:
            _check_known(named, names)
        wanted = {named.function.name for named in choice.allowed_tools.tools}
        places = [i for i, name in enumerate(names) if name in wanted]
        return plan._replace(
            tools=[functions[i] for i in places],
            places=places,
            required=choice.allowed_tools.mode == "required",
        )
    if choice == "none":
        return ToolPlan([], [])
    return plan._replace(required=choice == "required")


def _check_known(named: chat_api.NamedTool, names: Sequence[str]) -> None:
    if named.function.name not in names:
        raise _choice_error(f"there is no tool {named.function.name[:100]!r}")


def _choice_error(reason: str) -> ApiError:
    return ApiError(400, f"tool_choice: {reason}", param="tool_choice", code="invalid_value")


def _arguments(tool: chat_api.Tool, options: SchemaOptions, budget: SchemaBudget) -> PreparedSchema:
    function = tool.function
    return prepare_schema(arguments_schema(function.parameters), options.for_strict(function.strict), budget)
