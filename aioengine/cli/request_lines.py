"""Reads requests from JSON lines, and checks every line before any request runs."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from aioengine.checks import check_value, nearest
from aioengine.errors import RequestInvalid
from aioengine.request import Prompt, RequestOptions, SamplingParams, Wanted

_KINDS: dict[str, Any] = {
    "id": str | int,
    "prompt": str | list[int],
    "messages": list[dict[str, Any]],
    "adapter": str | dict[str, float] | None,
    "n": Annotated[int, Meta(ge=1, le=128)],
    "priority": int,
    "deadline": float,
    "tenant": str,
}
"""Fields of a line beside those of SamplingParams."""
_SCHEDULING = ("priority", "deadline", "tenant")
_LIKE_LEFT_OUT = ("n", *_SCHEDULING)
"""Fields that null leaves as the flags have them."""
_SAMPLING = tuple(name for name in SamplingParams.__struct_fields__ if name != "constraint")


class Request(NamedTuple):
    """One request of a batch."""

    id: str | int
    prompt: Prompt
    adapter: Wanted
    params: SamplingParams
    n: int
    scheduling: dict[str, Any]
    """Arguments of ``AsyncEngine.generate`` that were given: priority, deadline, tenant."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Values of the flags, for requests without these fields."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    """Send text prompts as messages."""
    system: str | None = None
    """A system message for requests without one; text prompts become messages."""

    def request(self, line: Mapping[str, Any], index: int) -> Request:
        """Return the request that the fields of a line describe, the ``index``-th. Raises RequestInvalid if
        they are wrong."""
        known = (*_KINDS, *_SAMPLING)
        for name in line:
            if name not in known:
                near = nearest(name, known)
                raise RequestInvalid(f"unknown field {name!r}{near}; there are {', '.join(known)}")
        own = {name: v for name, v in line.items() if v is not None or name not in _LIKE_LEFT_OUT}
        fields = {"id": index, "adapter": None, "n": 1, **self.fields, **own}
        for name, kind in _KINDS.items():
            if name in fields:
                check_value(name, fields[name], kind, RequestInvalid)
        RequestOptions(adapter=fields["adapter"])  # which checks it
        return Request(
            id=fields["id"],
            prompt=self._prompt(fields),
            adapter=fields["adapter"],
            params=SamplingParams(**_of(fields, _SAMPLING)),
            n=fields["n"],
            scheduling=_of(fields, _SCHEDULING),
        )

    def _prompt(self, fields: Mapping[str, Any]) -> Prompt:
        if ("prompt" in fields) == ("messages" in fields):
            raise RequestInvalid('give either "prompt" or "messages"')
        if "messages" in fields:
            messages: list[dict[str, Any]] = fields["messages"]
            has_system = any(message.get("role") == "system" for message in messages)
            return messages if has_system else [*self._system_message(), *messages]
        prompt: str | list[int] = fields["prompt"]
        if not self.chat and self.system is None:
            return prompt
        if not isinstance(prompt, str):
            raise RequestInvalid("--chat and --system need a text prompt, but this prompt is token ids")
        return [*self._system_message(), {"role": "user", "content": prompt}]

    def _system_message(self) -> list[dict[str, Any]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def _of(fields: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: fields[name] for name in names if name in fields}


def parse_lines(lines: Iterable[bytes], defaults: Defaults, source: str = "standard input") -> list[Request]:
    """Parse every line. Raises RequestInvalid, with the line's number, for the first that is wrong."""
    found: list[Request] = []
    line_of: dict[str | int, int] = {}
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # as some editors and PowerShell write it
        if not line.strip():
            continue
        try:
            fields = msgspec.json.decode(line, type=dict[str, Any])
            request = defaults.request(fields, len(found))
        except (msgspec.MsgspecError, RequestInvalid, TypeError, UnicodeDecodeError) as error:
            raise RequestInvalid(f"{source}, line {number}: {error}") from error
        except RecursionError:
            raise RequestInvalid(f"{source}, line {number}: is nested too deeply") from None
        first = line_of.setdefault(request.id, number)
        if first != number:
            raise RequestInvalid(
                f"{source}, line {number}: line {first} has the id {request.id!r} too; ids must "
                'differ, and a line without "id" has its number, from 0'
            )
        found.append(request)
    if not found:
        raise RequestInvalid("no PROMPT is given and standard input has no JSON lines; give one")
    return found
