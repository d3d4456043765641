"""Flags for the fields of configuration structs: names, types, texts and defaults are the structs' own."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
from cyclopts import Group, Parameter
from docstring_parser import parse_from_object

from aioengine.cli.help import FOLDED, shown_default

T = TypeVar("T")

LONG = 100
"""Characters of a text beyond which what it has in brackets is left out."""


class Flags:
    """Base of classes of flags, which :func:`flag_set` makes."""

    if TYPE_CHECKING:

        def __init__(self, **given: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...


class FieldsOf(NamedTuple):
    """Fields of a struct that get a flag each."""

    struct: type[msgspec.Struct]
    only: Sequence[str] | None = None
    """None: all but those that are ``left_out``."""
    left_out: Sequence[str] = ()
    also: Sequence[type[msgspec.Struct]] = ()
    """Structs with the texts of fields that have none here."""
    title: str | None = None
    """Title on help pages, unless it is that of the whole set."""


def flag_set(
    title: str, place: int, *sources: FieldsOf, shown: Sequence[str] | None = None, defaults: bool = False
) -> Callable[[type[T]], type[T]]:
    """Make a decorator that adds the flags of structs to those that a class has, and makes it a dataclass.

    Args:
        title: Title of the flags on help pages, which have them in the order of ``place``.
        shown: Flags that ``--help`` shows, in this order; all others are folded. None: it shows all.
        defaults: A struct's flag that is not given has the field's default; else it is None.
    """

    def group(of: str, name: str | None = None) -> Group:
        at = place + (of != title)
        if name is None or shown is None or name in shown:
            return Group(of, sort_key=at)
        return Group(f"{FOLDED}: {of.lower()}", sort_key=at + 50)

    def decorate(cls: type[T]) -> type[T]:
        annotations = {
            name: Annotated[kind, Parameter(group=group(title, name))]
            for name, kind in get_type_hints(cls, include_extras=True).items()
            if name in cls.__annotations__
        }
        for source in sources:
            hints, of = get_type_hints(source.struct), source.title or title
            texts = functools.reduce(dict.__or__, map(_texts, (*source.also, source.struct)))
            for field in msgspec.structs.fields(source.struct):
                name, kind = field.name, _flag_type(hints[field.name])
                left_out = name in source.left_out or (source.only is not None and name not in source.only)
                if left_out or name in annotations:
                    continue
                default = field.default if defaults else None
                kind = kind | None if default is None else kind
                text = shown_default(field.default) or False
                parameter = Parameter(group=group(of, name), help=texts.get(name, ""), show_default=text)
                annotations[name] = Annotated[kind, parameter]
                setattr(cls, name, default)
        first = {name: place for place, name in enumerate(shown or ())}
        cls.__annotations__ = dict(sorted(annotations.items(), key=lambda one: first.get(one[0], len(first))))
        return Parameter(name="*", group=group(title))(dataclass(frozen=True, kw_only=True)(cls))

    return decorate


def given(flags: object, struct: type[msgspec.Struct] | None = None) -> dict[str, Any]:
    """Return the flags that were given, by name; with ``struct``, those for its fields."""
    names = vars(flags) if struct is None else struct.__struct_fields__
    return {name: value for name in names if (value := vars(flags).get(name)) is not None}


def _flag_type(hint: Any) -> Any:
    """Return the type of a field's flag: of a union the one that a flag's text can be."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if kind in (bool, str):
            return kind
    for kind in kinds:
        if get_origin(kind) is Literal:
            return kind
        if isinstance(origin := get_origin(kind), type) and issubclass(origin, Sequence):
            return list[get_args(kind)[0]]  # type: ignore[misc] # a type that is made here
    return kinds[0]


@functools.cache
def _texts(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Return the first sentence of each field's docstring."""
    found: dict[str, str] = {}
    for field in parse_from_object(struct).params:
        plain = " ".join((field.description or "").split()).replace("``", "").replace('"', "")
        sentence = re.split(r"(?<!\.\.)[.;] ", plain)[0]
        if len(sentence) > LONG:
            sentence = sentence.split(" (")[0]
        found[field.arg_name] = f"{sentence.removesuffix('.')}."
    return found
