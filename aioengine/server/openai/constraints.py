"""What an answer must conform to: ``response_format``, ``structured_outputs``, ``tool_choice``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aioengine.guided import Guide
from aioengine.request import TokenConstraint
from aioengine.server.errors import ApiError
from aioengine.server.openai.api import GenerationFields, ResponseFormat, StructuredOutputs
from aioengine.server.openai.tools import ToolPlan

MakeConstraint = Callable[[Guide], Awaitable[TokenConstraint]]


def wanted_constraint(
    fields: GenerationFields, response_format: ResponseFormat | None = None, tools: ToolPlan | None = None
) -> MakeConstraint | None:
    """What makes a choice's constraint; None if the answer is free. Raises ApiError if there are two."""
    found: dict[str, MakeConstraint] = {}
    if response_format is not None and response_format.type != "text":
        found["response_format"] = _of_format(response_format)
    if fields.structured_outputs is not None:
        found["structured_outputs"] = _of_outputs(fields.structured_outputs)
    older = StructuredOutputs(
        json=fields.guided_json,
        regex=fields.guided_regex,
        choice=fields.guided_choice,
        grammar=fields.guided_grammar,
    )
    if older != StructuredOutputs():
        found["guided_json"] = _of_outputs(older)
    if tools is not None and not tools.is_free:
        found["tool_choice"] = tools.constraint
    if len(found) > 1:
        first, second, *_ = found
        raise ApiError(400, f"{first} and {second} cannot both hold", param=second, code="invalid_value")
    return next(iter(found.values()), None)


def _of_format(wanted: ResponseFormat) -> MakeConstraint:
    if wanted.type == "json_object":
        return lambda guide: guide.json_object()
    json_schema = wanted.json_schema
    schema = None if json_schema is None else json_schema.schema
    if schema is None:
        raise ApiError(
            400,
            "response_format: json_schema.schema is missing",
            param="response_format.json_schema.schema",
            code="invalid_value",
        )
    return lambda guide: guide.json_schema(schema)


def _of_outputs(wanted: StructuredOutputs) -> MakeConstraint:
    found: list[MakeConstraint] = []
    if (schema := wanted.json) is not None:
        found.append(lambda guide: guide.json_schema(schema))
    if (pattern := wanted.regex) is not None:
        found.append(lambda guide: guide.regex(pattern))
    if (options := wanted.choice) is not None:
        found.append(lambda guide: guide.choice(options))
    if (grammar := wanted.grammar) is not None:
        found.append(lambda guide: guide.lark(grammar))
    if len(found) != 1:
        raise ApiError(
            400,
            "structured_outputs: exactly one of json, regex, choice and grammar",
            param="structured_outputs",
            code="invalid_value",
        )
    return found[0]
