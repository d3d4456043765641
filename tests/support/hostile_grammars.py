"""Grammars that take more than they should: each of a kind, in sizes."""

from __future__ import annotations

import json
from typing import Any


def ref_chain(length: int) -> str:
    """A JSON schema in which references lead from one to the next."""
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    definitions[f"d{length}"] = {"type": "string"}
    return json.dumps({"$defs": definitions, "$ref": "#/$defs/d0"})


def property_chain(length: int) -> str:
    """... through properties."""
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"p": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)
    }
    definitions[f"d{length}"] = {"type": "string"}
    return json.dumps({"$defs": definitions, "$ref": "#/$defs/d0"})


def rule_chain(length: int) -> str:
    """A Lark grammar in which rules lead from one to the next."""
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(length))
    return f'start: r0\n{rules}\nr{length}: "a"'


def terminal_chain(length: int) -> str:
    rules = "\n".join(f"T{i}: T{i + 1}" for i in range(length))
    return f'start: T0\n{rules}\nT{length}: "a"'


def multiples(*factors: int) -> str:
    """A JSON schema whose automaton has as many states as the product of the factors."""
    return json.dumps({"allOf": [{"type": "integer", "multipleOf": factor} for factor in factors]})


def patterns(low: int, high: int) -> str:
    """A JSON schema whose automaton grows exponentially."""
    return json.dumps(
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(low, high)]}
    )


def properties(count: int) -> str:
    return json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}})


def enumeration(count: int) -> str:
    return json.dumps({"enum": [f"value {i}" for i in range(count)]})


AMBIGUOUS = 'start: e\ne: e e | "a" | "b" | e e e'
