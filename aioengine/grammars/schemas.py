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
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from aioengine.errors import RequestInvalid
from aioengine.grammars.alternatives import Traits, required_names, types
from aioengine.grammars.budget import MAX_DEPTH, SchemaBudget, check_lists, check_properties, json_of
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
_ALTERNATIVES = ("anyOf", "oneOf")
_IN_PLACE = ("$ref", "allOf", *_ALTERNATIVES)
"""Keywords whose schemas apply to the same value as the schema that contains them."""
_OF_ITEMS = ("items", "prefixItems", "additionalItems")
_LAST = ("properties", "$ref", "$ref")
"""Keywords that are written last where several schemas apply to a value; the second after the first."""
_OVERLAP = (
    "its alternatives overlap; tell them apart by type, or by a required property with different const "
    "values, or use anyOf"
)
_KEEP_OPEN = frozenset(
    {"const", "enum", "not", "if", "then", "else", "propertyNames", "unevaluatedProperties"}
    | {"dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"}
)
"""Keywords beside which an object stays open, because closing it could leave no valid value."""
_MANY_FOR_ONE = frozenset(("patternProperties", "contains"))
"""Keywords that can describe a value that another keyword describes as well."""

Schema = dict[str, Any]


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
    check_lists(schema)
    writer = _Writer(schema, options, budget or SchemaBudget())
    text = json_of({**writer.write(), "x-guidance": options.guidance})
    return PreparedSchema(text, tuple(writer.not_enforced))


def arguments_schema(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the schema of a function's arguments: always an object, and ``{}`` without properties.

    Raises RequestInvalid if the parameters are not of type "object".
    """
    given = (parameters or {}).get("type", "object")
    if given != "object" and not (isinstance(given, list) and "object" in given):
        raise RequestInvalid("a function's parameters must be a schema of type 'object'")
    schema = {**(parameters or {}), "type": "object"}
    if not (schema.keys() & {"properties", "additionalProperties", *_IN_PLACE, *_MANY_FOR_ONE, *_KEEP_OPEN}):
        schema["properties"] = {}
    return schema


class _Part(NamedTuple):
    """What a schema alone describes of a value that other schemas may describe as well."""

    names: frozenset[str] = frozenset()
    """Properties."""
    items: bool = False
    """The items."""
    is_member: bool = False
    """Whether it is one of several that apply to the value together."""

    def of_property(self, name: str, nested: _Part) -> _Part:
        """Return what the schema of a property describes of its value."""
        return (_ALL if name in self.names else _NOTHING) if self.is_member else nested


_ALL, _NOTHING = _Part(items=True), _Part()


def _part_of(members: Sequence[Schema]) -> _Part:
    """Return what each of the schemas that apply to a value together describes alone. A value that two of
    them describe must satisfy both: closing one could forbid names of the other."""
    if any(m.keys() & _MANY_FOR_ONE or isinstance(m.get("additionalProperties"), dict) for m in members):
        return _Part(is_member=True)
    declared = Counter(itertools.chain.from_iterable(_dict(member, "properties") for member in members))
    once = frozenset(name for name, count in declared.items() if count == 1)
    return _Part(once, sum(bool(member.keys() & set(_OF_ITEMS)) for member in members) == 1, is_member=True)


class _Writer:
    """Rewrites one schema. Its references become references to definitions in the result."""

    def __init__(self, root: Any, options: SchemaOptions, budget: SchemaBudget) -> None:
        self._root = root
        self._budget = budget
        self._options = options
        self._definitions: dict[tuple[str, bool], str] = {}
        """(Reference, closed?) -> its name in the result."""
        self._pending: list[tuple[str, bool]] = []
        """Definitions that are still to be written."""
        self._references = References(root)
        self._told: dict[int, Traits] = {}
        """What tells alternatives apart, by identity: many ``oneOf`` may refer to them."""
        self.not_enforced: dict[str, None] = {}

    def write(self) -> Schema:
        written = self._write(self._root, 0, _ALL)
        if written is True:
            written = {}
        if not isinstance(written, dict):
            raise RequestInvalid("the schema must be a JSON object")
        definitions: dict[str, Any] = {}
        while self._pending:
            reference, closed = self._pending.pop()
            target = self._write(self._references.target(reference), 0, _ALL if closed else _NOTHING)
            definitions[self._definitions[reference, closed]] = target
        return {**written, "$defs": definitions} if definitions else written

    def _write(self, schema: Any, depth: int, part: _Part) -> Any:
        """Write a schema and those within it; it describes ``part`` of a value alone. Objects that it alone
        describes are closed. Requirements that cannot be enforced are left out."""
        if not self._begin(schema, depth):
            return schema
        part = _NOTHING if self._options.open_objects else part
        in_place = [keyword for keyword in _IN_PLACE if keyword in schema]
        others = schema.keys() - _ANNOTATIONS - {"type", "nullable"}
        members: list[Schema] = []
        several = len(in_place) > 1 or (in_place and len(others) > 1)
        if part is _ALL and (several or ("allOf" in schema and len(_list(schema, "allOf")) > 1)):
            members = list(self._members(schema, depth, ()))
            part = _part_of(members)
        nested = _ALL if part.items and not schema.keys() & _MANY_FOR_ONE else _NOTHING
        written: Schema = {}

        def write(inner: Any, of: _Part = nested) -> Any:
            return self._write(inner, depth + 1, of)

        for key in sorted(schema, key=_LAST.count) if part.is_member else schema:
            value = schema[key]
            if key in _ANNOTATIONS:
                continue
            elif key == "$ref":
                if part.is_member:
                    target = write(self._references.target(value), part)
                    written["allOf"] = [target, *written.get("allOf", ())]
                else:
                    written[key] = self._definition(value, closed=part is _ALL)
            elif key in ("properties", "patternProperties"):
                inner_of = _dict(schema, key)
                self._budget.take_names(inner_of)
                written[key] = {
                    name: write(inner, part.of_property(name, nested) if key == "properties" else nested)
                    for name, inner in inner_of.items()
                }
            elif key == "prefixItems" or (key == "items" and isinstance(value, list)):  # until 2019-09
                written["prefixItems"] = list(map(write, _list(schema, key)))
            elif key == "additionalItems":
                if isinstance(schema.get("items"), list):
                    written["items"] = write(value)
            elif key in ("additionalProperties", "items"):
                written[key] = write(value)
            elif key in ("allOf", *_ALTERNATIVES):
                if key == "oneOf" and not self._told_apart(_list(schema, key)):
                    self._leave_out("oneOf", _OVERLAP)
                inners = [write(inner, part) for inner in _list(schema, key)]
                if key == "allOf":
                    written[key] = [*written.get(key, ()), *inners]
                elif "anyOf" in written:  # both anyOf and oneOf
                    written.setdefault("allOf", []).append({"anyOf": inners})
                else:
                    written["anyOf"] = inners
            elif key == "uniqueItems":
                if value is not False:
                    self._leave_out("uniqueItems")
            elif key == "format" and isinstance(value, str) and value not in FORMATS:
                if schema.get("type", "string") == "string":  # for numbers, a format only names their size
                    self._leave_out(f"format {value[:40]!r}")
            else:
                self._budget.take_characters(len(json_of({key: value})))
                written[key] = value
        if members and (closing := self._closing(schema, members)):
            written["allOf"] = [*written.get("allOf", ()), closing]
        elif part is _ALL and not in_place and "properties" in schema:
            self._close(written, schema)
        return written

    def _close(self, written: Schema, schema: Schema) -> None:
        """Allow only the names that the schema declares."""
        if "additionalProperties" not in schema and _may_close(schema, names := _names(schema)):
            new = [name for name in names if name not in written["properties"]]
            self._budget.take_names(new)
            written["properties"].update(dict.fromkeys(new, True))
            written["additionalProperties"] = False

    def _closing(self, schema: Schema, members: list[Schema]) -> Schema | None:
        """Return a schema that allows only the names which any of the schemas declares that apply to the
        value together; None if the object must stay open."""
        names = dict.fromkeys(itertools.chain.from_iterable(map(_names, members)), True)
        if not self._declares(schema) or not all(
            member.get("additionalProperties", False) is False and _may_close(member, names)
            for member in members
        ):
            return None
        self._budget.take_names(names)
        patterns = itertools.chain.from_iterable(_dict(member, "patternProperties") for member in members)
        closing: Schema = {"properties": names, "additionalProperties": False}
        if allowed := dict.fromkeys(patterns, True):
            closing["patternProperties"] = allowed
        return closing

    def _members(self, schema: Any, depth: int, path: tuple[str, ...]) -> Iterator[Schema]:
        """Return all schemas that apply to the same value: this one, and those within it that apply in
        place."""
        if not self._begin(schema, depth):
            return
        yield schema
        names = _dict(schema, "properties"), required_names(schema), _dict(schema, "patternProperties")
        self._budget.take_names(*names)
        for key in ("allOf", *_ALTERNATIVES):
            for inner in _list(schema, key) if key in schema else ():
                yield from self._members(inner, depth + 1, path)
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in path:
                raise RequestInvalid(f"the schema's reference {reference!r} leads back to itself")
            yield from self._members(self._references.target(reference), depth + 1, (*path, reference))

    def _declares(self, schema: Any) -> bool:
        """Whether every object that satisfies the schema has only declared properties, for all alternatives.
        References must not be circular."""
        if not isinstance(schema, dict):
            return False
        return (
            "properties" in schema
            or "object" not in types(schema)
            or any(self._declares(inner) for inner in schema.get("allOf", ()))
            or any(all(map(self._declares, schema[key])) for key in _ALTERNATIVES if key in schema)
            or ("$ref" in schema and self._declares(self._references.target(schema["$ref"])))
        )

    def _definition(self, reference: str, *, closed: bool) -> str:
        self._references.target(reference)
        if (reference, closed) not in self._definitions:
            self._definitions[reference, closed] = str(len(self._definitions))
            self._pending.append((reference, closed))
        return f"#/$defs/{self._definitions[reference, closed]}"

    def _told_apart(self, alternatives: Sequence[Any]) -> bool:
        """Whether it is clear that no value satisfies two alternatives of a ``oneOf``, so that it can be
        written as ``anyOf``."""
        if not self._budget.take_pairs(len(alternatives)):
            return False
        told = []
        for schema in alternatives:
            behind = self._references.behind(schema, _ANNOTATIONS)
            if id(behind) not in self._told:
                self._told[id(behind)] = Traits.by(behind)
            told.append(self._told[id(behind)])
        return all(one.excludes(other) for one, other in itertools.combinations(told, 2))

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
    return not schema.keys() & _KEEP_OPEN and isinstance(least, int) and least <= len(declared)


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
