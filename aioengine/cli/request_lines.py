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

_OWN: dict[str, Any] = {
    "id": str | int,
    "prompt": str | list[int],
    "messages": list[dict[str, Any]],
    "n": Annotated[int, Meta(ge=1, le=128)],
}
"""Fields of a line beside those of RequestOptions and of SamplingParams."""
_OPTIONS = ("adapter", "priority", "deadline", "tenant")
_LIKE_LEFT_OUT = ("n", "priority", "deadline", "tenant")
"""Fields that null leaves as the flags have them."""
_SAMPLING = tuple(name for name in SamplingParams.__struct_fields__ if name != "constraint")


class Request(NamedTuple):
    """One request of a batch."""

    id: str | int
    prompt: Prompt
    params: SamplingParams
    n: int
    options: dict[str, Any]
    """Arguments of ``AsyncEngine.generate`` that were given: adapter, priority, deadline, tenant."""

    @property
    def adapter(self) -> Wanted:
        adapter: Wanted = self.options["adapter"]
        return adapter


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
        known = (*_OWN, *_OPTIONS, *_SAMPLING)
        for name in line:
            if name not in known:
                near = nearest(name, known)
                raise RequestInvalid(f"unknown field {name!r}{near}; there are {', '.join(known)}")
        own = {name: v for name, v in line.items() if v is not None or name not in _LIKE_LEFT_OUT}
        fields = {"id": index, "adapter": None, "n": 1, **self.fields, **own}
        for name, kind in _OWN.items():
            if name in fields:
                check_value(name, fields[name], kind, RequestInvalid)
        options, sampling = ({n: fields[n] for n in of if n in fields} for of in (_OPTIONS, _SAMPLING))
        RequestOptions(**options)  # which checks them
        prompt, params = self._prompt(fields), SamplingParams(**sampling)
        return Request(fields["id"], prompt, params, fields["n"], options)

    def _prompt(self, fields: Mapping[str, Any]) -> Prompt:
        if ("prompt" in fields) == ("messages" in fields):
            raise RequestInvalid('give either "prompt" or "messages"')
        system: list[dict[str, Any]] = []
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        if "messages" in fields:
            messages: list[dict[str, Any]] = fields["messages"]
            has_system = any(message.get("role") == "system" for message in messages)
            return messages if has_system else [*system, *messages]
        prompt: str | list[int] = fields["prompt"]
        if not self.chat and not system:
            return prompt
        if not isinstance(prompt, str):
            raise RequestInvalid("--chat and --system need a text prompt, but this prompt is token ids")
        return [*system, {"role": "user", "content": prompt}]


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
