"""Checks of plain values from callers and files, with one wording for all of them."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import unquote

import msgspec
from msgspec import Meta

from aioengine.errors import AioEngineError, ConfigError, RequestInvalid
from aioengine.schedulers.checks import error_text as error_text
from aioengine.schedulers.checks import nearest as nearest

LARGEST = sys.float_info.max

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(gt=0, le=LARGEST, extra={"is": "more than 0 seconds"})]
AnySeconds = Annotated[float, Meta(gt=0, extra={"is": "more than 0 seconds"})]
Text = Annotated[str, Meta(min_length=1)]
Size = Annotated[int | str, Meta(extra={"is": "bytes, or text such as '512MiB' or '2GiB'"})]
"""A size in memory; :func:`check_fields` makes it a number."""
FilePath = Annotated[str, Meta(pattern=r"\A[^\0]+\Z", extra={"is": "the path of a file or folder"})]


def check_value(
    field: str, value: Any, kind: Any, error: type[AioEngineError] = ConfigError, *, strict: bool = True
) -> Any:
    """Return the value, a number or text of a class of its own (NumPy's) as one of Python's. Raises
    ``error``, which names ``field`` and what is allowed, if a field of type ``kind`` cannot have it."""
    if isinstance(value, float | int | str) and not isinstance(value, bool):
        value = plain(value)
    try:
        msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as wrong:
        raise error(_refusal(field, value, kind, wrong)) from wrong
    return value


def _refusal(field: str, value: Any, kind: Any, wrong: msgspec.ValidationError) -> str:
    """Say in words for people what msgspec says, such as "Expected `int` >= 1 - at `$.pins[2]`"."""
    if isinstance(wrong.__cause__, AioEngineError):
        return str(wrong.__cause__)
    said, _, path = str(wrong).partition(" - at `$")
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        if index:
            kinds = [part for part in (kind, *get_args(kind)) if get_origin(part) in _LISTS]
            kind = get_args(kinds[0])[0] if kinds else None
            field, value = f"{field}[{index}]", list(value)[int(index)]  # it may be a set
            continue
        field = f"{field}.{name}" if field else name
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        parts = (part for part in (kind, *get_args(kind)) if isinstance(part, type))
        structs = [part for part in parts if issubclass(part, msgspec.Struct)]
        kind = _fields_of(structs[0]).kinds.get(name) if structs else None
    for part in (kind, *get_args(kind)):
        for meta in getattr(part, "__metadata__", ()):
            if "is" in (getattr(meta, "extra", None) or {}):
                return f"{field}={value!r}: must be {meta.extra['is']}"
        if get_origin(part) is Literal and (choices := get_args(part))[1:]:
            listed = ", ".join(map(str, choices))
            return f"{field}={value!r}: allowed are {listed}; choose one of them{nearest(value, choices)}"
    if not field:
        return str(wrong)
    if (expected := re.match(r"Expected `([^`]*)`(?: ([^,]*)|)", said)) is None:
        return f"{field}={value!r}: {said}"
    types = ", or ".join(_WORDS.get(name, name) for name in expected[1].split(" | "))
    if isinstance(value, float) and not math.isfinite(value):
        types = "a finite number"
    elif expected[2]:
        types = expected[2]
    return f"{field}={value!r}: must be {types}"


_WORDS = {"int": "an integer", "float": "a number", "str": "text", "bool": "True or False", "null": "None"}
_WORDS |= {"array": "a list", "object": "a table"}
"""Types as msgspec and as people call them."""
_LISTS = (list, tuple, set, frozenset, Sequence)


class _Fields(NamedTuple):
    """The fields of a struct, by name, with their types."""

    kinds: dict[str, Any]
    sizes: list[str]
    """Those that are a :data:`Size`."""
    same: type[msgspec.Struct]
    """A struct with these fields, without checks of its own."""


@functools.cache
def _fields_of(cls: type[msgspec.Struct]) -> _Fields:
    hints = get_type_hints(cls, include_extras=True)
    kinds = {name: hints[name] for name in cls.__struct_fields__}
    sizes = [name for name, kind in kinds.items() if Size in (kind, *get_args(kind))]
    return _Fields(kinds, sizes, msgspec.defstruct(cls.__name__, list(kinds.items())))


def check_fields(struct: msgspec.Struct, error: type[AioEngineError] = ConfigError) -> None:
    """Raise ``error`` for the first field that is not of its annotated type, or out of its range or choices,
    and turn sizes into bytes."""
    kinds, sizes, same = _fields_of(type(struct))
    try:
        msgspec.convert(struct, same, from_attributes=True)
    except msgspec.ValidationError:
        for field, kind in kinds.items():
            value = check_value(field, getattr(struct, field), kind, error)
            msgspec.structs.force_setattr(struct, field, value)
    for field in sizes:
        if (size := getattr(struct, field)) is not None:
            msgspec.structs.force_setattr(struct, field, parse_bytes(size, field=field))


def plain(value: object) -> float | int | str:
    """Return a number or text of a class of its own, such as NumPy's, as one of Python's: msgspec calls this
    for what it cannot encode. Raises TypeError for anything else."""
    for kind in (float, int, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: int | str, *, field: str) -> int:
    """Return a size in bytes from an int, or from text such as "512MiB", "2 GiB" or "1.5GB". Raises
    ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        text = value if isinstance(value, str) else ""  # 1.5 would be one byte
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"{field}={value!r}: must be bytes, or text such as '512MiB' or '2GiB'")
        number = int(float(match[1]) * _UNITS[match[2].lower()])
    if number <= 0:
        raise ConfigError(f"{field}={value!r}: must be more than zero bytes")
    return number


def file_url_path(text: str, *, field: str = "path") -> str | None:
    """Return the path in a URL "file:///absolute/path", or None for other text. Raises ConfigError if it
    names another machine."""
    scheme, _, rest = text.partition("://")
    if scheme.lower() != "file":
        return None
    host, _, path = rest.partition("/")
    if host not in ("", "localhost") or not path:
        raise ConfigError(f"{field}={text!r}: must be file:///absolute/path")
    return unquote(f"/{path}")


def format_bytes(value: float) -> str:
    """Return the bytes as people read them: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file. Raises ConfigError if it cannot be read or is not TOML."""
    return _read_table(path, "TOML", tomllib.loads)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file with a JSON object. Raises ConfigError if it cannot be read or has something else."""
    found = _read_table(path, "JSON", json.loads)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _read_table(path: str | Path, form: str, parse: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not of this form, no UTF-8, or nested too deeply
        raise ConfigError(f"{path}: not valid {form}: {error}") from error


def check_items(what: str, values: Any, most: int) -> None:
    """Raise RequestInvalid if all lists in ``values``, plain data, have more than ``most`` items together.
    (What an object holds is bounded elsewhere, by its names.)"""
    left = most
    found = [values]
    while found:
        inner = found.pop()
        if isinstance(inner, dict):
            inner = inner.values()
        else:
            left -= len(inner)
            if left < 0:
                raise RequestInvalid(f"the lists in {what} have more than {most} items together; send fewer")
        found += [value for value in inner if isinstance(value, dict | list | tuple)]


S = TypeVar("S", bound=msgspec.Struct)


def from_plain(cls: type[S], values: Mapping[str, Any], source: str, *, strict: bool = True) -> S:
    """Convert plain data, such as a parsed TOML file, to a struct; not ``strict``: also texts of numbers.
    Raises ConfigError, which begins with ``source`` and names a field that is unknown."""
    refuse_unknown(cls, values, source)
    try:
        return msgspec.convert(dict(values), cls, strict=strict)
    except msgspec.ValidationError as wrong:
        raise ConfigError(f"{source}: {_refusal('', values, cls, wrong)}") from wrong


def refuse_unknown(cls: type[msgspec.Struct], values: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for a key that is no field of ``cls``; it names the nearest field."""
    fields = list(cls.__struct_fields__)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"{source}: unknown field {key!r}{nearest(key, fields)}; "
                f"fields of {cls.__name__}: {', '.join(fields)}"
            )
