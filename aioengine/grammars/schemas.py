"""Prepares JSON schemas for the grammar compiler: closed objects, compact text, nothing ignored silently.

A schema that declares ``properties`` and does not say whether others are allowed allows any others. A small
model then invents properties until its tokens are used up. So objects are closed here: only declared names
stay allowed. The rules keep two promises (tests/grammars/test_schemas.py checks them with generated schemas):

- A value that satisfies the closed schema satisfies the original.
- A value that satisfies the original, with declared names only, satisfies the closed one. "Declared" are the
  names in ``properties``, ``patternProperties`` and ``required`` of the schemas that apply to the object at
  once. Those in ``allOf`` and behind ``$ref`` count together; each alternative of a single ``anyOf`` alone.

``additionalProperties: true`` (or a schema) keeps an object open.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from aioengine.checks import check_items
from aioengine.errors import RequestInvalid
from aioengine.grammars.alternatives import Traits, types
from aioengine.grammars.budget import MAX_DEPTH, MAX_ITEMS, SchemaBudget, check_properties, required_names
from aioengine.grammars.references import References

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Values of ``format`` that the compiler knows; others do not constrain the text."""

_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$comment", "$schema", "$id", "$anchor", "$defs", "definitions", "discriminator", "x-guidance"}
)
"""Keywords that do not affect validity. References are resolved here."""
_REFERENCE = _ANNOTATIONS | {"$ref"}
_ALTERNATIVES = ("anyOf", "oneOf")
_IN_PLACE = ("$ref", "allOf", *_ALTERNATIVES)
"""Keywords whose schemas apply to the same value as the schema that contains them."""
_OF_ITEMS = frozenset({"items", "prefixItems", "additionalItems"})
_LAST = ("properties", "$ref", "$ref")
"""Keywords that are written last where several schemas apply to a value; the second after the first."""
_OVERLAP = (
    "its alternatives overlap; tell them apart by type, or by a required property with different const "
    "values, or use anyOf"
)
_KEEP_OPEN = frozenset({"const", "enum"})
"""Keywords beside which an object stays open, because closing it could leave no valid value. The compiler
refuses the others of this kind (``not``, ``if``, ``propertyNames``, ``dependentRequired``, ...)."""
_MANY_FOR_ONE = frozenset({"patternProperties", "contains"})
"""Keywords that can describe a value that another keyword describes as well."""

Schema = dict[str, Any]
Own = frozenset[object] | None
"""What a schema alone describes of a value that others may describe, too: names of properties, and
``_ITEMS``. None: everything."""
_NOTHING, _ITEMS = frozenset[object](), object()


class SchemaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options for reading a JSON schema, and for the JSON that is written."""

    open_objects: bool = False
    """Allow undeclared properties wherever the schema does not forbid them, as JSON Schema itself does."""
    any_whitespace: bool = False
    """Let the model lay the JSON out, with up to 32 spaces and line breaks between two tokens. Otherwise
    there is at most one space, after a comma or a colon."""
    lenient: bool = True
    """Accept requirements that cannot be enforced token by token but hardly matter to readers of the answer:
    ``uniqueItems``, unknown formats, and ``oneOf`` with overlapping alternatives (then any match is
    accepted). Otherwise such a schema is refused."""

    def for_strict(self, strict: bool | None) -> SchemaOptions:
        """Return these options for a schema with the given ``strict``: true always closes objects."""
        return msgspec.structs.replace(self, open_objects=False) if strict else self

    @property
    def guidance(self) -> Mapping[str, Any]:
        """Options of the compiler."""
        if self.any_whitespace:
            return {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
        return {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class PreparedSchema(NamedTuple):
    text: str
    """The schema for the compiler, as JSON."""
    not_enforced: tuple[str, ...]
    """Keywords that were left out, such as ``uniqueItems``, each once."""


def prepare_schema(
    schema: Mapping[str, Any] | bool | str, options: SchemaOptions, budget: SchemaBudget | None = None
) -> PreparedSchema:
    """Prepare a schema for the compiler. ``schema`` may be JSON text. Schemas of one request share a
    ``budget``.

    Takes time in proportion to the schema's size, within the budget. Raises RequestInvalid for an invalid
    schema, one that is too large or nested too deeply, a reference without a target, or requirements that
    cannot be enforced.
    """
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestInvalid(f"the schema is not JSON: {error}") from error
    if isinstance(schema, dict):
        check_items("the schema", schema, MAX_ITEMS)
    writer = _Writer(schema, options, budget or SchemaBudget())
    text = _json({**writer.write(), "x-guidance": options.guidance})
    return PreparedSchema(text, tuple(writer.not_enforced))


def arguments_schema(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the schema of a function's arguments: always an object, and ``{}`` without properties.

    Raises RequestInvalid if the parameters are not of type "object".
    """
    given = (parameters or {}).get("type", "object")
    if given != "object" and not (isinstance(given, list) and "object" in given):
        raise RequestInvalid("a function's parameters must be a schema of type 'object'")
    schema = {**(parameters or {}), "type": "object"}
    if not schema.keys() & {"properties", "additionalProperties", *_MANY_FOR_ONE, *_IN_PLACE, *_KEEP_OPEN}:
        schema["properties"] = {}
    return schema


def _described_once(members: Sequence[Schema]) -> frozenset[object]:
    """Return what only one of the schemas that apply to a value together describes. A value that two of them
    describe must satisfy both: closing one could forbid names of the other."""
    if any(m.keys() & _MANY_FOR_ONE or isinstance(m.get("additionalProperties"), dict) for m in members):
        return _NOTHING
    described = Counter[object](itertools.chain.from_iterable(_dict(each, "properties") for each in members))
    described[_ITEMS] = sum(bool(each.keys() & _OF_ITEMS) for each in members)
    return frozenset(name for name, count in described.items() if count == 1)


class _Writer:
    """Rewrites one schema. Its references become references to definitions in the result."""

    def __init__(self, root: Any, options: SchemaOptions, budget: SchemaBudget) -> None:
        self._root = root
        self._budget = budget
        self._options = options
        self._definitions: dict[tuple[str, bool], str] = {}
        """(Reference, closed?) -> its name in the result."""
        self._found: list[tuple[str, bool]] = []
        """The same, in order."""
        self._references = References(root)
        self._traits: dict[int, Traits] = {}
        """What tells alternatives apart, by identity: many ``oneOf`` may refer to them."""
        self.not_enforced: dict[str, None] = {}

    def write(self) -> Schema:
        written = self._write(self._root, 0, None)
        if written is True:
            written = {}
        if not isinstance(written, dict):
            raise RequestInvalid("the schema must be a JSON object")
        definitions: dict[str, Any] = {}
        for reference, closed in self._found:  # more are found meanwhile
            target = self._write(self._references.target(reference), 0, None if closed else _NOTHING)
            definitions[self._definitions[reference, closed]] = target
        return {**written, "$defs": definitions} if definitions else written

    def _write(self, schema: Any, depth: int, own: Own) -> Any:
        """Write a schema and those within it. Objects that a schema alone describes are closed, and
        requirements that cannot be enforced are left out."""
        if not self._begin(schema, depth):
            return schema
        own = _NOTHING if self._options.open_objects else own
        members: list[Schema] = [schema]
        is_closed = own is None and "properties" in schema
        keywords = schema.keys() - _ANNOTATIONS - {"type", "nullable"}
        are_several = len(keywords) > 1 or ("allOf" in keywords and len(_list(schema, "allOf")) > 1)
        if own is None and are_several and not keywords.isdisjoint(_IN_PLACE):
            members = []
            is_closed = self._gather(schema, depth, (), members)
            own = _described_once(members)
        written: Schema = {}
        inner_own = _NOTHING if schema.keys() & _MANY_FOR_ONE else own

        def write(inner: Any, name: object) -> Any:
            is_own = inner_own is None or name in inner_own
            return self._write(inner, depth + 1, None if is_own else _NOTHING)

        for key in sorted(schema, key=_LAST.count) if own else schema:
            value = schema[key]
            if key in _ANNOTATIONS:
                continue
            elif key == "$ref" and own:  # in place: a definition knows nothing of ``own``
                target = self._write(self._references.target(value), depth + 1, own)
                written["allOf"] = [target, *written.get("allOf", ())]
            elif key == "$ref":
                written[key] = self._definition(value, closed=own is None)
            elif key in ("properties", "patternProperties"):
                inner_of = _dict(schema, key)
                self._budget.take(inner_of)
                written[key] = {name: write(inner, name) for name, inner in inner_of.items()}
            elif key == "prefixItems" or (key == "items" and isinstance(value, list)):  # until 2019-09
                written["prefixItems"] = [write(inner, _ITEMS) for inner in _list(schema, key)]
            elif key == "additionalItems":
                if isinstance(schema.get("items"), list):
                    written["items"] = write(value, _ITEMS)
            elif key in ("additionalProperties", "items"):
                written[key] = write(value, _ITEMS)
            elif key in ("allOf", *_ALTERNATIVES):
                if key == "oneOf" and not self._told_apart(_list(schema, key)):
                    self._leave_out("oneOf", _OVERLAP)
                inners = [self._write(inner, depth + 1, own) for inner in _list(schema, key)]
                if key != "allOf" and "anyOf" not in written:
                    written["anyOf"] = inners
                else:  # the second of anyOf and oneOf is one more schema
                    written.setdefault("allOf", []).extend(inners if key == "allOf" else [{"anyOf": inners}])
            elif key == "uniqueItems":
                if value is not False:
                    self._leave_out("uniqueItems")
            elif key == "format" and isinstance(value, str) and value not in FORMATS:
                if schema.get("type", "string") == "string":  # for numbers, a format only names their size
                    self._leave_out(f"format {value[:40]!r}")
            else:
                self._budget.take((_json({key: value}),))
                written[key] = value
        if is_closed and "additionalProperties" not in schema:
            self._close(written, members)
        return written

    def _close(self, written: Schema, members: Sequence[Schema]) -> None:
        """Allow only the names that any of the schemas declares that apply to the value together, if each of
        them can be closed."""
        names = dict.fromkeys(itertools.chain.from_iterable(map(_names, members)), True)
        if all(_may_close(each, names) for each in members):
            self._budget.take(names)
            written["properties"] = names | written.get("properties", {})
            if patterns := {name: True for each in members for name in _dict(each, "patternProperties")}:
                written["patternProperties"] = patterns | written.get("patternProperties", {})
            written["additionalProperties"] = False

    def _gather(self, schema: Any, depth: int, path: tuple[str, ...], members: list[Schema]) -> bool:
        """Add all schemas to ``members`` that apply to the same value: this one, and those within it that
        apply in place. Returns whether each object that satisfies it has only declared properties, whichever
        alternatives it satisfies."""
        if not self._begin(schema, depth):
            return False
        members.append(schema)
        names = _dict(schema, "properties"), required_names(schema), _dict(schema, "patternProperties")
        self._budget.take(*names)
        declares = "properties" in schema or "object" not in types(schema)
        for key in ("allOf", *_ALTERNATIVES):
            if key in schema:
                found = [self._gather(inner, depth + 1, path, members) for inner in _list(schema, key)]
                declares |= any(found) if key == "allOf" else all(found)
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in path:
                raise RequestInvalid(f"the schema's reference {reference!r} leads back to itself")
            target = self._references.target(reference)
            declares |= self._gather(target, depth + 1, (*path, reference), members)
        return declares

    def _definition(self, reference: str, *, closed: bool) -> str:
        self._references.target(reference)
        if (reference, closed) not in self._definitions:
            self._definitions[reference, closed] = str(len(self._found))
            self._found.append((reference, closed))
        return f"#/$defs/{self._definitions[reference, closed]}"

    def _told_apart(self, alternatives: Sequence[Any]) -> bool:
        """Whether it is clear that no value satisfies two alternatives of a ``oneOf``, so that it can be
        written as ``anyOf``."""
        if not self._budget.take_pairs(len(alternatives)):
            return False
        traits = []
        for schema in alternatives:
            for _ in range(MAX_DEPTH):  # what is behind mere references; all() stops at the first other key
                if isinstance(schema, dict) and "$ref" in schema and all(key in _REFERENCE for key in schema):
                    schema = self._references.target(schema["$ref"])
            if id(schema) not in self._traits:
                self._traits[id(schema)] = Traits.by(schema)
            traits.append(self._traits[id(schema)])
        return all(one.excludes(other) for one, other in itertools.combinations(traits, 2))

    def _begin(self, schema: Any, depth: int) -> bool:
        """Count a schema; returns whether it has content. Raises RequestInvalid."""
        self._budget.take_schema()
        if depth > MAX_DEPTH:
            raise RequestInvalid(f"the schema is nested more than {MAX_DEPTH} levels deep")
        if not isinstance(schema, (dict, bool)):
            shown = "a list" if isinstance(schema, list) else repr(schema)[:100]
            raise RequestInvalid(f"the schema has {shown} where a schema must be")
        return isinstance(schema, dict)

    def _leave_out(self, what: str, why: str = "it cannot be enforced token by token") -> None:
        if not self._options.lenient:
            raise RequestInvalid(f"the schema's {what}: {why}")
        self.not_enforced[what] = None


def _may_close(schema: Schema, declared: Collection[str]) -> bool:
    least = schema.get("minProperties", 0)
    return (
        not schema.keys() & _KEEP_OPEN
        and schema.get("additionalProperties", False) is False
        and isinstance(least, int)
        and least <= len(declared)
    )


def _names(schema: Schema) -> dict[str, None]:
    """Return the names of properties that a schema declares or requires, in order."""
    names = dict.fromkeys((*_dict(schema, "properties"), *required_names(schema)))
    check_properties(names)
    return names


def _dict(schema: Schema, key: str) -> dict[str, Any]:
    value = schema.get(key, {})
    if not isinstance(value, dict):
        raise RequestInvalid(f"the schema's {key} must be an object")
    check_properties(value)
    return value


def _list(schema: Schema, key: str) -> list[Any]:
    value = schema[key]
    if not isinstance(value, list) or not value:
        raise RequestInvalid(f"the schema's {key} must be a list of at least one schema")
    return value


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestInvalid(f"the schema cannot be written as JSON: {error}") from error
