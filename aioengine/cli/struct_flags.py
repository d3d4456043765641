"""Flags for the fields of configuration structs: names, types, texts and defaults are the structs' own."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
from cyclopts import Group, Parameter

from aioengine.cli.help import with_default

T = TypeVar("T")

LONG = 100
"""Characters of a text beyond which what it has in brackets is left out."""


class StructFlags:
    """Base of the flags of structs. A flag that is not given is None."""

    if TYPE_CHECKING:

        def __init__(self, **given: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...


def given(flags: object, struct: type[msgspec.Struct] | None = None) -> dict[str, Any]:
    """Return the flags that were given, by name; with ``struct``, those for its fields."""
    names = vars(flags) if struct is None else struct.__struct_fields__
    return {name: value for name in names if (value := vars(flags).get(name)) is not None}


def flags_of(
    struct: type[msgspec.Struct],
    *,
    group: Group,
    more: Group | None = None,
    shown: Sequence[str] = (),
    only: Sequence[str] | None = None,
    left_out: Sequence[str] = (),
    also: Sequence[type[msgspec.Struct]] = (),
    defaults: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Make a decorator that adds to a class a flag for each field of a struct, before it becomes a dataclass.
    Flags that the class has itself stay as they are.

    Args:
        group: Group of the flags in ``shown``.
        more: Group of all others.
        also: Structs with the texts of fields that have none here.
        defaults: A flag that is not given has the field's default; else it is None.
        only: The fields that get a flag; None: all but those that are ``left_out``.
    """

    def decorate(cls: type[T]) -> type[T]:
        hints = get_type_hints(struct)
        texts: dict[str, str] = {}
        for described in (*also, struct):
            texts |= _texts(described)
        for field in msgspec.structs.fields(struct):
            if field.name in (*cls.__annotations__, *left_out):
                continue
            if only is not None and field.name not in only:
                continue
            kind = _flag_type(hints[field.name])
            parameter = Parameter(
                group=group if more is None or field.name in shown else more,
                help=with_default(texts.get(field.name, ""), None if defaults else _default(field.default)),
                negative="" if get_origin(kind) is list else None,
            )
            default = field.default if defaults else None
            cls.__annotations__[field.name] = Annotated[kind | None if default is None else kind, parameter]
            setattr(cls, field.name, default)
        return cls

    return decorate


def _default(value: Any) -> str | None:
    """Return a default as help shows it."""
    shown = isinstance(value, str | int | float) and not isinstance(value, bool) and value not in ("", "auto")
    return str(value) if shown else None


def _flag_type(hint: Any) -> Any:
    """Return the type of a field's flag: of a union the one that a flag's text can be."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if kind in (bool, str):
            return kind
    for kind in kinds:
        if get_origin(kind) is Literal:
            return kind
        if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Sequence):
            return list[get_args(kind)[0]]  # type: ignore[misc] # a type that is made here
    return kinds[0]


@functools.cache
def _texts(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Return the first sentence of each field's docstring."""
    try:
        module = ast.parse(inspect.getsource(inspect.getmodule(struct) or struct))
    except OSError:  # only compiled files are there
        return {}
    (body,) = (
        node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == struct.__name__
    )
    found: dict[str, str] = {}
    for field, text in pairwise(body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                sentence = re.split(
                    r"(?<!\.\.)[.;] ", " ".join(doc.split()).replace("``", "").replace('"', "")
                )[0]
                if len(sentence) > LONG:
                    sentence = sentence.split(" (")[0]
                found[name] = f"{sentence.removesuffix('.')}."
    return found
