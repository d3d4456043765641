"""How families of models write calls and reasoning, and how these are read; docs/server.md has the formats.
For models whose own format is not known, calls are a JSON list of {"name", "arguments"}, to which a
constraint holds the answer. Text that is no such call stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from aioengine.server.formats.source import (
    NO_MARKS,
    Marks,
    Reasoning,
    Source,
    Steps,
    arguments_call,
    call_of,
)

MAX_CALLS = 16
"""Bound on the calls of one answer where calls are required and ``parallel_tool_calls`` is true."""
FIRST_ARGUMENTS = 3
"""Number of the grammar's line with the first tool's arguments; each tool has a line of its own."""

Read = Callable[[Source], Steps[None]]
"""A format's generator."""


class CallText(NamedTuple):
    """The text around the arguments of calls, so that a grammar can hold an answer to it."""

    opening: str
    """Text before a call's arguments; ``{}`` stands for its name, and a brace is written twice."""
    closing: str
    begin: str = ""
    """Before the first call."""
    between: str = ""
    end: str = ""
    """After the last call."""
    most: int = MAX_CALLS

    def grammar(
        self, names: Sequence[str], schemas: Sequence[str], tokens: Mapping[str, int], *, parallel: bool
    ) -> str:
        """Return a grammar in Lark's notation: calls of ``names`` whose arguments conform to ``schemas``,
        which are JSON schemas as llguidance reads them. It allows one call, or up to ``most`` if
        ``parallel``.

        ``tokens`` has the ids of texts that are single tokens, because the model writes these as tokens.
        """

        def quoted(text: str) -> str:
            """Write the text as terminals, with a space after each; nothing for an empty text, as Lark
            requires."""
            marks = sorted((token for token in tokens if token in text), key=len, reverse=True)
            parts = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
            known = (f"<[{tokens[part]}]>" if part in marks else json.dumps(part) for part in parts if part)
            return "".join(f"{terminal} " for terminal in known)

        again = f"({quoted(self.between)}call){{0,{self.most - 1}}} " if parallel and self.most > 1 else ""
        start = f"start: {quoted(self.begin)}call {again}{quoted(self.end)}".rstrip()
        rules = [start, "call: " + " | ".join(f"call_{i}" for i in range(len(names)))]
        assert len(rules) + 1 == FIRST_ARGUMENTS
        rules += [f"arguments_{i}: %json {schema}" for i, schema in enumerate(schemas)]
        for i, name in enumerate(names):
            opening, closing = quoted(self.opening.format(name)), quoted(self.closing)
            rules.append(f"call_{i}: {opening}arguments_{i} {closing}".rstrip())
        return "\n".join(rules)


_OBJECT = '{{"name": "{}", "arguments": '
JSON_TEXT = CallText(_OBJECT, "}", begin="[", between=",", end="]")

# Hermes, Qwen 2.5 and 3

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
HERMES_TEXT = CallText(f"{TOOL_CALL}\n{_OBJECT}", f"}}\n{END_TOOL_CALL}", between="\n")
_HERMES = Marks(TOOL_CALL)


def hermes(names: frozenset[str]) -> Read:
    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_HERMES)):
            before = yield from source.blank()
            body, is_complete = yield from source.json_object()
            after = yield from source.blank()
            is_closed = is_complete and (yield from source.literal(END_TOOL_CALL))
            call = call_of(body, names) if is_closed else None
            yield call or TOOL_CALL + before + body + after + (END_TOOL_CALL if is_closed else "")

    return steps


# Llama 3.1 to 3.3

PYTHON_TAG = "<|python_tag|>"
LLAMA_TEXT = CallText('{{"name": "{}", "parameters": ', "}", between="; ")


def llama3(names: frozenset[str]) -> Read:
    def steps(source: Source) -> Steps[None]:
        before = yield from source.blank()
        if (yield from source.literal(PYTHON_TAG)):
            before += PYTHON_TAG
        yield from _listed(source, names, before, ";", "")
        yield from source.until(NO_MARKS)

    return steps


# Mistral: older models write a list, newer ones the name before the arguments, also with a call's id

TOOL_CALLS, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
MISTRAL_LIST_TEXT = CallText(_OBJECT, "}", begin=f"{TOOL_CALLS}[", between=", ", end="]")
MISTRAL_TEXT = CallText(f"{TOOL_CALLS}{{}}{ARGUMENTS}", "")
_MISTRAL, _ID_END = Marks(TOOL_CALLS), Marks(ARGUMENTS, "{")
_NAME = re.compile(r"[A-Za-z0-9_.-]*")


def mistral(names: frozenset[str]) -> Read:
    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_MISTRAL)):
            read = TOOL_CALLS + (yield from source.blank())
            if (yield from source.literal("[")):
                yield from _listed(source, names, read + "[", ",", "]")
            else:
                yield from _named(source, names, read)

    return steps


def _named(source: Source, names: frozenset[str], read: str) -> Steps[None]:
    """Read a call whose name stands before its arguments."""
    name = yield from source.matching(_NAME, 64)
    read += name
    if (yield from source.literal(CALL_ID)):
        id_, mark = yield from source.read_until(_ID_END)
        read += CALL_ID + id_ + mark
        if mark == "{":
            yield read
            return
    elif (yield from source.literal(ARGUMENTS)):
        read += ARGUMENTS
    read += yield from source.blank()
    body, is_complete = yield from source.json_object()
    yield (arguments_call(name, body) if is_complete and name in names else None) or read + body


def _listed(source: Source, names: frozenset[str] | None, read: str, between: str, end: str) -> Steps[None]:
    """Read calls of ``names``, each an object, up to ``end`` or to what is no call. Without an ``end``,
    nothing has to be between them. ``read`` is the text that was read before."""
    while True:
        read += yield from source.blank()
        body, is_complete = yield from source.json_object()
        call = call_of(body, names) if is_complete else None
        if call is None:
            yield read + body
            return
        yield call
        read = yield from source.blank()
        if end and (yield from source.literal(end)):
            return
        if (yield from source.literal(between)):
            read += between
        elif end:
            yield read
            return


# FunctionGemma: call:name{key:<escape>text<escape>,other:[1,true]} between its marks

GEMMA_OPEN, GEMMA_CLOSE = "<start_function_call>", "<end_function_call>"
_GEMMA, _GEMMA_END = Marks(GEMMA_OPEN), Marks(GEMMA_CLOSE)
_CALL = re.compile(r"\s*call:\s*(?P<name>[A-Za-z0-9_.-]{1,64})\s*(?P<arguments>\{.*\})\s*", re.DOTALL)
_TOKEN = re.compile(
    r"\s*(?:<escape>(?P<text>.*?)<escape>|(?P<mark>[{}\[\]:,])|(?P<bare>[^{}\[\]:,<\s]+))(?P<is_key>\s*:)?",
    re.DOTALL,
)
_LITERAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")


def gemma(names: frozenset[str]) -> Read:
    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_GEMMA)):
            body, mark = yield from source.read_until(_GEMMA_END)
            found = _CALL.fullmatch(body) if mark else None
            call = None
            if found is not None and found["name"] in names:
                call = arguments_call(found["name"], "".join(_as_json(found["arguments"].rstrip())))
            yield call or GEMMA_OPEN + body + mark

    return steps


def _as_json(text: str) -> Iterator[str]:
    """Write the arguments as JSON: texts and names get their quotes. What is not well formed becomes no
    JSON."""
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            yield "?"
            return
        at = found.end()
        is_key, bare = found["is_key"] is not None, found["bare"]
        if found["mark"]:
            yield found["mark"]
        elif bare is not None and not is_key and _LITERAL.fullmatch(bare):
            yield bare
        else:
            yield json.dumps(found["text"] if bare is None else bare, ensure_ascii=False)
        if is_key:
            yield ":"


# GPT-OSS ("harmony"): a sequence of <|channel|>NAME to=RECIPIENT<|constrain|>json<|message|>TEXT<|end|>. The
# prompt ends with <|start|>assistant, so the first message has no start of its own.

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
HARMONY_TEXT = CallText(f"{CHANNEL}commentary to=functions.{{}} <|constrain|>json{MESSAGE}", "", most=1)
"""Beginning and end are empty, because the model has tokens of its own there. An answer has one call."""
_BEGIN = Marks(CHANNEL, START)
_HEADER_END = Marks(MESSAGE, START)
_BODY_END = Marks("<|end|>", "<|return|>", "<|call|>", START, CHANNEL)
_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([A-Za-z0-9_.-]+)")


def harmony(names: frozenset[str], reasons: bool = True) -> Read:
    """Parse messages: "analysis" is reasoning, unless ``reasons`` is false; one to ``functions.NAME`` is a
    call; everything else is text for the user."""

    def steps(source: Source) -> Steps[None]:
        to = " to="
        mark = to if (yield from source.literal(to)) else (yield from source.until(_BEGIN))
        while mark:
            header, end = yield from source.read_until(_HEADER_END)
            header = mark + header
            if end != MESSAGE:
                if end != START:
                    yield header
                mark = end
                continue
            channel, recipient = _CHANNEL_NAME.search(header), _RECIPIENT.search(header)
            if recipient and recipient[1] in names:
                body, mark = yield from source.read_until(_BODY_END)
                yield arguments_call(recipient[1], body or "{}") or header + MESSAGE + body
            else:
                is_reasoning = reasons and channel is not None and channel[1] == "analysis"
                mark = yield from source.until(_BODY_END, Reasoning if is_reasoning else str)
            if mark and mark not in (START, CHANNEL):
                mark = yield from source.until(_BEGIN)

    return steps


# What a constraint holds an answer to: a call that is cut off is left out


def json_calls(source: Source) -> Steps[None]:
    """Read an answer that is a list of {"name", "arguments"}."""
    yield from source.literal("[")
    for piece in _listed(source, None, "", ",", "]"):
        if not isinstance(piece, str):
            yield piece


def named_call(name: str) -> Read:
    """Read an answer that is the arguments of ``name`` alone."""

    def steps(source: Source) -> Steps[None]:
        yield from source.blank()
        body, _ = yield from source.json_object()
        if (call := arguments_call(name, body)) is not None:
            yield call

    return steps


# Qwen 3, DeepSeek R1 and many others

THINK, END_THINK = "<think>", "</think>"
_THINK_END = Marks(END_THINK)


def think(then: Read, *, is_open: bool) -> Read:
    """Parse reasoning between the tags, if the prompt has opened it (``is_open``) or the answer begins with
    the tag. ``then`` parses the rest. White space beside the tags is dropped."""

    def steps(source: Source) -> Steps[None]:
        space = yield from source.blank()
        if (yield from source.literal(THINK)) or is_open:
            yield from source.blank()
            yield from source.until(_THINK_END, Reasoning)
            yield from source.blank()
        elif space:
            yield space
        yield from then(source)

    return steps
