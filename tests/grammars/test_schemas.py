"""Schemas as they are prepared for the grammar compiler: closed, and neither wrong nor impossible."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokens import TOKENS, llguidance
from support.machine import slowness

from aioengine.errors import RequestInvalid
from aioengine.grammars.budget import MAX_CHARACTERS, MAX_DEPTH, MAX_ITEMS, MAX_SCHEMAS
from aioengine.grammars.schemas import FORMATS, SchemaOptions, arguments_schema, prepare_schema

STRICT = SchemaOptions(lenient=False)
NAMES = ("a", "b")
VALUES: list[Any] = [
    1,
    "s",
    {},
    {"a": 1},
    {"b": "s"},
    {"a": 1, "b": 1},
    {"z": 1},
    {"a": {"a": 1}},
    [{"a": 1}],
]
INSTANCES: list[Any] = [
    *VALUES,
    *(
        {name: value for name, value in zip((*NAMES, "z"), values, strict=True) if value is not None}
        for values in product([None, *VALUES], [None, *VALUES], [None, 1])
    ),
]

references = st.sampled_from(["#/$defs/X", "#/$defs/Y"]).map(lambda reference: {"$ref": reference})
leaves = st.sampled_from(
    [True, {}, {"type": "integer"}, {"type": "string"}, {"const": 1}, {"const": {"z": 1}}, {"type": "object"}]
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": st.just("object"),
        "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
        "required": st.lists(st.sampled_from([*NAMES, "z"]), max_size=2, unique=True),
        "additionalProperties": st.one_of(st.booleans(), inner),
        "patternProperties": st.fixed_dictionaries({"^[bz]$": inner}),
        "minProperties": st.integers(0, 3),
        "items": inner,
        "anyOf": st.lists(inner, min_size=1, max_size=3),
        "allOf": st.lists(inner, min_size=1, max_size=2),
        "oneOf": st.lists(inner, min_size=1, max_size=2),
        "$ref": references.map(lambda found: found["$ref"]),
    }
    likely = {key: keywords[key] for key in ("type", "properties")}
    return st.one_of(
        st.fixed_dictionaries(likely, optional={"required": keywords["required"]}),
        st.fixed_dictionaries({}, optional=keywords),
        inner.map(lambda found: {"anyOf": [found, {"type": "string"}]}),
    )


schemas = st.recursive(st.one_of(leaves, references), objects, max_leaves=6)
documents = st.builds(
    lambda root, x, y: {**(root if isinstance(root, dict) else {"allOf": [root]}), "$defs": {"X": x, "Y": y}},
    schemas,
    schemas,
    schemas,
)


def in_place(schema: Any) -> Iterator[str]:
    """Names of the definitions that apply to the same value."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rsplit("/", 1)[1]
        for key in ("allOf", "anyOf", "oneOf"):
            for inner in schema.get(key, ()):
                yield from in_place(inner)


def is_circular(document: Any) -> bool:
    """Whether a definition is defined by itself: such schemas mean nothing."""
    x, y = (set(in_place(document["$defs"][name])) for name in ("X", "Y"))
    return "X" in x or "Y" in y or ("Y" in x and "X" in y)


def closed(schema: Any, options: SchemaOptions = STRICT) -> Any:
    written = json.loads(prepare_schema(schema, options).text)
    del written["x-guidance"]
    return written


def valid(schema: Any, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def expansions(schema: Any, root: Any) -> Iterator[list[dict[str, Any]]]:
    """All ways to choose one of each ``anyOf`` and ``oneOf``: the schemas that then apply at once."""
    if not isinstance(schema, dict):
        yield [] if schema else [{"not": {}}]
        return
    own = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "allOf", "$ref")}
    parts = [[inner] for inner in schema.get("allOf", ())]
    parts += [schema[key] for key in ("anyOf", "oneOf") if key in schema]
    if "$ref" in schema:
        parts.append([root["$defs"][schema["$ref"].rsplit("/", 1)[1]]])
    for chosen in product(*parts):
        for found in product(*(list(expansions(inner, root)) for inner in chosen)):
            yield [own, *(member for members in found for member in members)]


def declared_only(schema: Any, value: Any, root: Any) -> bool:
    """Whether a value satisfies a schema with declared names alone, by trying every choice."""
    return any(_declared_only(members, value, root) for members in expansions(schema, root))


def _declared_only(members: list[dict[str, Any]], value: Any, root: Any) -> bool:
    if not all(valid({**member, "$defs": root["$defs"]}, value) for member in members):
        return False
    if isinstance(value, list):
        inner = {"allOf": [member["items"] for member in members if "items" in member]}
        return all(declared_only(inner, item, root) for item in value)
    if not isinstance(value, dict):
        return True
    names = {name for m in members for name in (*m.get("properties", ()), *m.get("required", ()))}
    declares = any("properties" in member for member in members)
    patterns = [pattern for m in members for pattern in m.get("patternProperties", ())]
    if declares and not any("additionalProperties" in member for member in members):
        for name in value:
            if name not in names and not any(name in pattern for pattern in patterns):
                return False
    for name, inner_value in value.items():
        inner = [m["properties"][name] for m in members if name in m.get("properties", ())]
        inner += [
            found
            for m in members
            for pattern, found in m.get("patternProperties", {}).items()
            if name in pattern
        ]
        inner += [
            m["additionalProperties"]
            for m in members
            if "additionalProperties" in m
            and name not in m.get("properties", ())
            and not any(name in pattern for pattern in m.get("patternProperties", ()))
        ]
        if not declared_only({"allOf": inner}, inner_value, root):
            return False
    return True


@settings(derandomize=True, max_examples=150, deadline=None)
@given(documents.filter(lambda found: not is_circular(found)), st.randoms(use_true_random=False))
@pytest.mark.slow
def test_closing_is_sound_and_leaves_what_is_declared(schema: Any, random: Any) -> None:
    try:
        written = closed(schema)
    except RequestInvalid:  # overlapping oneOf, or a reference that leads back to itself
        return
    original_of, closed_of = (jsonschema.Draft202012Validator(found) for found in (schema, written))
    for value in random.sample(INSTANCES, 40):
        original, now = original_of.is_valid(value), closed_of.is_valid(value)
        assert original or not now, f"{written} takes {value}"
        if original and not now:
            assert not declared_only(schema, value, schema), f"{written} refuses {value}"


def matcher(schema: Any, options: SchemaOptions = STRICT) -> Any:
    text = prepare_schema(schema, options).text
    return llguidance.LLMatcher(TOKENS, llguidance.LLMatcher.grammar_from_json_schema(text), log_level=0)


def takes(schema: Any, text: str, options: SchemaOptions = STRICT) -> bool:
    found = matcher(schema, options)
    assert not found.is_error(), found.get_error()
    return bool(found.consume_tokens(list(text.encode())) and found.is_accepting())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(documents.filter(lambda found: not is_circular(found)))
@pytest.mark.slow
def test_what_can_be_compiled_can_be_compiled_closed(schema: Any) -> None:
    try:
        was_usable = not matcher(schema, SchemaOptions(lenient=False, open_objects=True)).is_error()
    except RequestInvalid:
        return
    if was_usable:
        found = matcher(schema)
        assert not found.is_error(), found.get_error()


INTEGER = {"type": "integer"}
PAIR: dict[str, Any] = {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "accepted", "refused"),
    [
        (PAIR, ['{"a": 1}', '{"a":1,"b":2}', '{"a":1, "b": 2}'], ['{"a":1,"z":2}', '{"a":  1}', '{ "a":1}']),
        ({**PAIR, "additionalProperties": True}, ['{"a": 1, "z": []}'], ["{}"]),
        ({**PAIR, "additionalProperties": INTEGER}, ['{"a": 1, "z": 2}'], ['{"a":1,"z":[]}']),
        ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}']),
        ({"type": "object"}, ["{}", '{"a": 1}'], []),
        ({"type": "object", "additionalProperties": INTEGER}, ['{"x": 1}'], ['{"x": ""}']),
        ({**PAIR, "required": ["a", "c"]}, ['{"a":1,"c":[]}'], ['{"a":1}', '{"a":1,"c":1,"z":1}']),
        (
            {"allOf": [PAIR, {"type": "object", "properties": {"c": PAIR}, "required": ["c"]}]},
            ['{"a":1,"c":{"a":1}}'],
            ['{"a":1,"c":{"a":1},"z":1}', '{"a":1,"c":{"a":1,"z":1}}'],
        ),
        (
            {"$ref": "#/$defs/P", "description": "beside it", "$defs": {"P": PAIR}},
            ['{"a":1}'],
            ['{"a":1,"z":1}'],
        ),
        (
            {"$ref": "#/$defs/P", "properties": {"c": INTEGER}, "$defs": {"P": PAIR}},
            ['{"c":1,"a":1}'],
            ['{"c":1,"a":1,"z":1}'],
        ),
        (
            {"anyOf": [PAIR, {"type": "object", "properties": {"c": INTEGER}, "required": ["c"]}]},
            ['{"a":1}', '{"c":1}'],
            ['{"a":1,"c":1}', '{"c":1,"z":1}'],
        ),
        (  # names that two say something about, whose values would each be closed without the other
            {
                "allOf": [
                    {"properties": {"x": {"properties": {"p": INTEGER}, "required": ["p"]}}},
                    {"properties": {"x": {"properties": {"q": INTEGER}, "required": ["q"]}}},
                ],
                "type": "object",
                "required": ["x"],
            },
            ['{"x":{"p":1,"q":1}}'],
            ['{"x":{"p":1}}', '{"x":{"p":1,"q":1},"z":1}'],
        ),
        (  # draft 4 to 2019
            {"type": "array", "items": [PAIR, {"type": "string"}], "additionalItems": False},
            ['[{"a":1}, "x"]'],
            ['[{"a":1,"z":1}]'],
        ),
        (
            {
                "$defs": {
                    "Node": {
                        "type": "object",
                        "properties": {
                            "v": INTEGER,
                            "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
                        },
                        "required": ["v", "next"],
                    }
                },
                "$ref": "#/$defs/Node",
            },
            ['{"v":1,"next":{"v":2,"next":null}}'],
            ['{"v":1,"next":{"v":2,"next":null,"z":1}}'],
        ),
        (
            {
                "oneOf": [
                    {
                        "type": "object",
                        "properties": {"kind": {"const": kind}, kind: INTEGER},
                        "required": ["kind"],
                    }
                    for kind in ("cat", "dog")
                ],
                "discriminator": {"propertyName": "kind"},
            },
            ['{"kind":"cat","cat":1}'],
            ['{"kind":"cat","dog":1}'],
        ),
    ],
)
def test_what_is_left(schema: Any, accepted: list[str], refused: list[str]) -> None:
    for text in accepted:
        assert takes(schema, text), text
    for text in refused:
        assert not takes(schema, text), text


def test_the_switches() -> None:
    assert takes(PAIR, '{"a":1,"z":2}', SchemaOptions(open_objects=True))
    assert takes(PAIR, '{\n  "a":   1\n}', SchemaOptions(any_whitespace=True))
    assert not takes(PAIR, '{"a":1,"z":2}', SchemaOptions(open_objects=True).for_strict(True))
    unique = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "binary"}}
    prepared = prepare_schema(unique, SchemaOptions())
    assert prepared.not_enforced == ("uniqueItems", "format 'binary'")
    long = {"type": "string", "format": "\U000e0001" * 500}
    assert len(prepare_schema(long, SchemaOptions()).not_enforced[0]) < 500, "fits into a header"
    assert takes(unique, '["a","a"]', SchemaOptions())
    overlapping = {"oneOf": [PAIR, {"type": "object", "properties": {"a": INTEGER}}]}
    assert prepare_schema(overlapping, SchemaOptions()).not_enforced == ("oneOf",)
    for schema, reason in ((unique, "uniqueItems"), (overlapping, "alternatives overlap")):
        with pytest.raises(RequestInvalid, match=reason):
            prepare_schema(schema, STRICT)


@pytest.mark.parametrize("format_", [*sorted(FORMATS), "binary", "byte", "regex", "path"])
def test_which_formats_the_compiler_knows(format_: str) -> None:
    schema = {"type": "string", "format": format_}
    assert not matcher(schema, SchemaOptions()).is_error()
    raw = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    is_known = not llguidance.LLMatcher(TOKENS, raw, log_level=0).is_error()
    assert is_known == (format_ in FORMATS)


@pytest.mark.parametrize(
    ("parameters", "accepted", "refused"),
    [
        (None, "{}", '{"a": 1}'),
        ({}, "{}", '{"a": 1}'),
        ({"type": "object"}, "{}", '{"a": 1}'),
        ({"type": "object", "properties": {}}, "{}", '{"a": 1}'),
        ({"type": "object", "properties": {}, "required": []}, "{}", '{"a": 1}'),
        ({"properties": {"a": INTEGER}}, '{"a": 1}', "3"),
        ({"type": "object", "additionalProperties": INTEGER}, '{"a": 1}', '{"a": ""}'),
        ({"$ref": "#/$defs/P", "$defs": {"P": PAIR}}, '{"a": 1}', '{"z": 1}'),
    ],
)
def test_arguments_of_functions(parameters: Any, accepted: str, refused: str) -> None:
    schema = arguments_schema(parameters)
    assert takes(schema, accepted)
    assert not takes(schema, refused)


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubling(levels: int) -> Any:
    """References that apply in place and double at each level."""
    defs: dict[str, Any] = {"0": PAIR}
    for i in range(levels):
        defs[str(i + 1)] = {"allOf": [{"$ref": f"#/$defs/{i}"}, {"$ref": f"#/$defs/{i}"}]}
    return {"allOf": [{"$ref": f"#/$defs/{levels}"}, True], "$defs": defs}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (nested(MAX_DEPTH + 2), "nested more than"),
        (nested(50_000), "nested more than"),
        (doubling(40), f"more than {MAX_SCHEMAS}|nested more than"),
        (doubling(14), f"more than {MAX_SCHEMAS}"),
        ({"allOf": [{}] * MAX_SCHEMAS}, f"more than {MAX_SCHEMAS}"),
        ({"$ref": "#/$defs/none"}, "leads to no schema"),
        ({"$ref": "http://example.com/x"}, "leads to no schema"),
        (
            {"$ref": "#/$defs/A", "properties": {}, "$defs": {"A": {"allOf": [{"$ref": "#/$defs/A"}]}}},
            "itself",
        ),
        ({"properties": []}, "properties must be an object"),
        ({"properties": {"a": 3}}, "where a schema must be"),
        ({"anyOf": []}, "at least one"),
        ([], "where a schema must be"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(RequestInvalid, match=reason):
        prepare_schema(schema, SchemaOptions())


def reference_chain(length: int) -> Any:
    defs: dict[str, Any] = {
        str(i): {"properties": {"n": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(length)
    }
    return {"$ref": "#/$defs/0", "$defs": {**defs, str(length): {}}}


def overlapping(alternatives: int, names: int) -> Any:
    """All that two alternatives can be told apart by is equal."""
    values = {"enum": list(range(64))}
    properties = {f"p{i}": values for i in range(names)}
    one = {"type": "object", "properties": properties, "required": list(properties)}
    return {"oneOf": [dict(one) for _ in range(alternatives)]}


def told_by_the_last(alternatives: int, names: int) -> Any:
    """Disjoint, but only the last of many required properties shows it."""
    required = [f"p{i}" for i in range(names)]
    return {
        "oneOf": [
            {"type": "object", "properties": {required[-1]: {"const": i}}, "required": required}
            for i in range(alternatives)
        ]
    }


@pytest.mark.parametrize(
    "schema",
    [
        reference_chain(9_000),
        overlapping(90, 60),
        {"anyOf": [{"properties": {f"p{i}": INTEGER for i in range(1_900)}} for _ in range(10)]},
        {"oneOf": [{"const": i} for i in range(15_000)]},
        told_by_the_last(60, 1_000),
    ],
    ids=["references", "alternatives", "properties", "constants", "required"],
)
@pytest.mark.slow
def test_the_work_is_bounded(schema: Any) -> None:
    """The time grows with the schema and not with its square, which would be four seconds and more."""
    begin = time.thread_time()
    prepare_schema(schema, SchemaOptions())
    assert time.thread_time() - begin < 2 * slowness()


WORD = "w" * 40_000
LARGE: dict[str, Any] = {
    "enum": {"enum": [f"{i:08d}" for i in range(10_000)]},
    "const": {"const": "x" * 100_000},
    "pattern": {"pattern": "x" * 100_000},
    "names": {"properties": {f"{i:0100d}": True for i in range(1_000)}},
    "one name": {"properties": {"x" * 100_000: True}},
    "patterns": {"patternProperties": {"x" * 100_000: True}},
    "required": {"required": [f"{i:0100d}" for i in range(1_000)], "properties": {"a": True}},
    "not": {"not": {"enum": [[i] for i in range(20_000)]}},
    "unknown": {"x" * 100_000: 1},
    "types": {"type": ["object"] * 130_000, "properties": {}},
    "one required": {"required": ["a"] * 2_000, "properties": {}},
    "the same required": {"required": ["a"] * 130_000, "properties": {}},
    "many keywords": {"$ref": "#/$defs/other", **{f"k{i}": 1 for i in range(60_000)}},
    "constants": {
        "required": list("abcdefghij"),
        "properties": {n: {"enum": list(range(64))} for n in "abcdefghij"},
    },
    "a long pointer": {"$ref": "#/$defs/" + "".join(f"%{ord(char):x}" for char in WORD)},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["allOf", "anyOf", "oneOf", "chain", "pairs"])
@pytest.mark.parametrize("what", LARGE)
def test_what_many_references_lead_to_is_not_written_without_bound(what: str, how: str) -> None:
    """A hundred kilobytes, and 9,000 references to it: a gigabyte, if it were written for each."""
    reference = {"$ref": "#/$defs/large"}
    defs: dict[str, Any] = {"large": LARGE[what], WORD: PAIR, "other": PAIR}
    if how == "chain":
        defs |= {f"{i}": {"allOf": [{"$ref": f"#/$defs/{i + 1}"}, reference]} for i in range(60)}
        schema: Any = {"allOf": [{"$ref": "#/$defs/0"}, True], "$defs": {**defs, "60": True}}
    elif how == "pairs":
        pairs = {f"p{i}": {"oneOf": [reference, reference]} for i in range(1_000)}
        schema = {"properties": {f"g{i}": {"properties": pairs} for i in range(5)}, "$defs": defs}
    else:
        schema = {how: [reference] * 9_000, "properties": {"a": {how: [reference] * 99}}, "$defs": defs}
    begin = time.thread_time()
    written = ""
    with contextlib.suppress(RequestInvalid):
        written = prepare_schema(schema, SchemaOptions()).text
    assert len(written) <= 1.2 * MAX_CHARACTERS + 100 * MAX_SCHEMAS
    assert time.thread_time() - begin < 2 * slowness()


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": INTEGER for i in range(2_001)}},
        {"items": {"patternProperties": {f"p{i}": INTEGER for i in range(2_001)}}},
        {"type": "object", "properties": {}, "required": [f"p{i}" for i in range(2_001)]},
    ],
)
def test_too_many_properties_of_an_object_are_refused_at_once(schema: Any) -> None:
    with pytest.raises(RequestInvalid, match="2001 properties, and at most 2000"):
        prepare_schema(schema, SchemaOptions())


@pytest.mark.parametrize("place", ["enum", "const", "examples"])
def test_too_many_items_are_refused_before_they_are_written(place: str, monkeypatch: Any) -> None:
    """Writing them holds the interpreter, also in a thread."""
    written: list[Any] = []
    monkeypatch.setattr(json, "dumps", lambda value, **_: written.append(value) or "")
    for schema in ({place: [1] * (MAX_ITEMS + 1)}, {"items": {place: [[1] * 2] * MAX_ITEMS}}):
        with pytest.raises(RequestInvalid, match=f"more than {MAX_ITEMS} items"):
            prepare_schema(schema, SchemaOptions())
    assert not written
