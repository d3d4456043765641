"""Makes up requests from a server's own description of its API.

Values are near and above every bound, of every other type, odd in their characters, numbers and nesting, and
some keys come twice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from support.made_uploads import upload

UPLOAD = "/v1/upload_lora_adapter"
TEXTS = ["", " ", "a", "\0", "\n", "é", "\ud800", "\udfff", "\u202e", "\ufeff", "👩‍👩‍👧", "e" + "\u0301" * 50]
TEXTS += ["<|im_start|>", "<tool_call>", "</think>", "{{ 7 * 7 }}", "../../etc/passwd", "%2e%2e/", "hf:a/b"]
NUMBERS = ["0", "-1", "1", "0.5", "-0.0", "1e308", "1e400", "5e-324", "NaN", "Infinity", str(2**31)]
NUMBERS += [str(2**63 - 1), str(2**63), str(2**64), "1" * 400, "1e-5", "3.0", "01", "0x1"]
OTHERS = ["null", "true", "[]", "{}", "[null]", '""', "[[]]", '{"":{}}', '"\\ud800"', "[" * 600 + "]" * 600]
WORDS = ["type", "properties", "enum", "$ref", "anyOf", "pattern", "required", "a"]
KINDS = ["application/json"] * 20 + ["text/plain", "application/json; charset=utf-16", "", "multipart/x"]
LARGE = 20_000
"""Maximum length of a text or list that is not near a smaller bound."""
LONGEST = 16 * 2**20
LONG_LIST = 20
"""Length from which a list has the same item again and again."""


class Literal(str):
    """JSON that is written as it is."""


class Made(NamedTuple):
    method: str
    path: str
    body: bytes
    kind: str = "application/json"


class Maker:
    """Makes requests, each from its seed alone.

    Args:
        document: The server's OpenAPI document.
        model: A model that it serves.
    """

    def __init__(self, document: Mapping[str, Any], model: str) -> None:
        self._schemas = document["components"]["schemas"]
        self._model = model
        self._operations = [
            (method.upper(), path, operation)
            for path, methods in sorted(document["paths"].items())
            for method, operation in sorted(methods.items())
        ]

    def request(self, draw: random.Random) -> Made:
        method, path, operation = draw.choice(self._operations)
        if path == UPLOAD:
            query, body, kind = upload(draw, self._model)
            return Made(method, f"{path}?{query}", _spoilt(draw, body), kind)
        if "requestBody" not in operation:
            return Made(method, path, b"", draw.choice(KINDS))
        [content] = operation["requestBody"]["content"].values()
        text = _Body(self._schemas, self._model, draw).text(content["schema"])
        body = _spoilt(draw, text.encode("utf-8", "surrogatepass"))
        return Made(method, path, body, draw.choice(KINDS))


class _Body:
    """Makes the body of one request."""

    def __init__(self, schemas: Mapping[str, Any], model: str, draw: random.Random) -> None:
        self._schemas = schemas
        self._draw = draw
        self._room = LONGEST
        """Bytes that long lists may still take: a long list of long lists would take gigabytes."""
        choice = draw.choice

        def few() -> int:
            return choice([1, 1, 2, 3, 8, 8, 100, 0, 2**40])

        self._known: dict[str, Callable[[], Any]] = {
            "model": lambda: choice([model] * 6 + ["nobody", "", "../x", model + "@1", "a" * 300]),
            "max_tokens": few,
            "max_completion_tokens": few,
            "max_output_tokens": few,
            "n": lambda: choice([1, 1, 1, 2, 16, 128, 129]),
            "lora_path": lambda: choice(["x", "..", "/etc", "/dev/zero", "\0", "x" * 5000]),
            "messages": lambda: [self._message() for _ in range(choice([1, 1, 2, 40, 2048, 2049]))],
        }
        """Fields for which values by type alone would be refused nearly always."""

    def text(self, schema: Any) -> str:
        return self._written(self._value(schema, 0))

    def _value(self, schema: Any, depth: int) -> Any:
        draw = self._draw
        if draw.random() < 0.01:
            return Literal(draw.choice(NUMBERS + OTHERS))
        while isinstance(schema, dict) and "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        if not isinstance(schema, dict) or depth > 12:
            return self._anything(depth)
        for key in ("oneOf", "anyOf", "allOf"):
            if schema.get(key):
                return self._value(draw.choice(schema[key]), depth + 1)
        if "const" in schema or "enum" in schema:
            return draw.choice(schema.get("enum") or [schema.get("const")])
        kind = schema.get("type")
        match draw.choice(kind) if isinstance(kind, list) else kind:
            case "string":
                return self._string(schema)
            case "integer" | "number":
                return self._number(schema)
            case "boolean":
                return draw.random() < 0.5
            case "null":
                return None
            case "array":
                size, items = (
                    self._size(schema.get("minItems", 0), schema.get("maxItems")),
                    schema.get("items"),
                )
                if size > LONG_LIST:
                    return [self._value(items, depth + 1)] * size
                return [self._value(items, depth + 1) for _ in range(size)]
            case "object":
                return self._object(schema, depth)
        return self._object(schema, depth) if "properties" in schema else self._anything(depth)

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        draw = self._draw
        made: dict[str, Any] = {}
        required = schema.get("required", ())
        for name, inner in schema.get("properties", {}).items():
            if draw.random() < (0.98 if name in required else 0.07):
                known = self._known.get(name) if draw.random() < 0.95 else None
                made[name] = self._value(inner, depth + 1) if known is None else known()
        if draw.random() < 0.02:
            made[self._some_text(20)] = self._anything(depth)
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            for i in range(self._size(0, schema.get("maxProperties"))):
                made[str(i) if draw.random() < 0.9 else self._some_text(5)] = self._value(more, depth + 1)
        return made

    def _string(self, schema: Mapping[str, Any]) -> str:
        size = self._size(schema.get("minLength", 0), schema.get("maxLength"))
        text = self._some_text(30)
        return text if size <= 30 else ((text or "x") * size)[:size]

    def _number(self, schema: Mapping[str, Any]) -> Any:
        draw = self._draw
        names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        bounds = [schema[name] for name in names if name in schema]
        if bounds and draw.random() < 0.5:
            return draw.choice(bounds) + draw.choice([-1, 0, 0, 1])
        return Literal(draw.choice(NUMBERS)) if draw.random() < 0.2 else draw.choice([0, 1, 2, 7])

    def _size(self, least: int, most: int | None) -> int:
        sizes = [least, least, least + 1, least + 1, least + 3, 300]
        if most is not None:
            sizes += [min(most, LARGE), min(most, LARGE) + 1]
        return max(0, self._draw.choice(sizes))

    def _message(self) -> dict[str, str]:
        role = self._draw.choice(["user", "user", "assistant", "system", "tool"])
        return {"role": role, "content": self._some_text(100)}

    def _some_text(self, most: int) -> str:
        count = self._draw.randint(1, max(1, most // 4))
        return "".join(self._draw.choices(TEXTS + ["word "] * 20, k=count))

    def _anything(self, depth: int) -> Any:
        draw = self._draw
        kind = draw.randrange(6 if depth < 8 else 4)
        if kind == 4:
            return [self._anything(depth + 2) for _ in range(draw.randrange(4))]
        if kind == 5:
            return {draw.choice(WORDS): self._anything(depth + 2) for _ in range(draw.randrange(4))}
        return [self._some_text(20), Literal(draw.choice(NUMBERS[:8])), None, "Hi"][kind]

    def _written(self, value: Any) -> str:
        """Write JSON; some objects have a key twice."""
        draw = self._draw
        if isinstance(value, Literal):
            return str(value)
        if isinstance(value, dict):
            items = [f"{json.dumps(key)}:{self._written(inner)}" for key, inner in value.items()]
            if items and draw.random() < 0.02:
                items.append(draw.choice(items))
            return "{" + ",".join(items) + "}"
        if isinstance(value, list):
            if len(value) > LONG_LIST and all(item is value[0] for item in value):
                items = [self._written(value[0])]
                items *= max(1, min(len(value), self._room // (len(items[0]) + 1)))
                self._room -= sum(map(len, items))
            else:
                items = [self._written(item) for item in value]
            return "[" + ",".join(items) + "]"
        return json.dumps(value, ensure_ascii=draw.random() < 0.5)


def _spoilt(draw: random.Random, body: bytes) -> bytes:
    """Damage some bodies: cut off, other bytes, very long."""
    chance = draw.random()
    at = draw.randrange(len(body) + 1)
    if chance < 0.03:
        return body[:at]
    if chance < 0.06:
        return body[:at] + draw.randbytes(3) + body[at + 3 :]
    if chance < 0.08:
        return body + b" " * draw.choice([10**5, 10**6, 2**20, 2**23])
    return body
