"""Checks of plain values from callers and files, with one wording for all of them."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta, inspect

from aioengine.errors import AioEngineError, ConfigError, RequestInvalid
from aioengine.schedulers.error_text import error_text as error_text
from aioengine.schedulers.nearest import nearest as _nearest_name

_LARGEST = sys.float_info.max


def check_integer(
    field: str,
    value: object,
    *,
    low: int | None = None,
    high: int | None = None,
    error: type[AioEngineError] = ConfigError,
) -> None:
    """Raise ``error``, naming ``field``, unless ``value`` is an integer in ``low..high``."""
    bound = "" if low is None else f">= {low}" if high is None else f"in {low}..{high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise error(f"{field}={value!r}: must be an integer {bound}".rstrip())
    if (low is not None and value < low) or (high is not None and value > high):
        raise error(f"{field}={value}: must be {bound}")


def check_number(
    field: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    above: bool = False,
    error: type[AioEngineError] = ConfigError,
) -> None:
    """Raise ``error``, naming ``field``, unless ``value`` is a finite number from ``low`` to ``high``; with
    ``above``, ``low`` itself is not allowed."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        raise error(f"{field}={value!r}: must be a finite number")
    if value < low or value > high or (above and value == low):
        if high == math.inf:
            bound = f"more than {low:g}" if above else f">= {low:g}"
        else:
            bound = f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise error(f"{field}={value}: must be {bound}")


def check_seconds(
    field: str,
    value: object,
    allowed: str = "",
    *,
    finite: bool = False,
    error: type[AioEngineError] = ConfigError,
) -> None:
    """Raise ``error``, naming ``field``, unless ``value`` is more than 0 and, with ``finite``, finite.
    ``allowed`` is added to the message."""
    wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0
    if wrong or (finite and value == math.inf):
        raise error(f"{field}={value!r}: must be more than 0 seconds{allowed}")


Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(gt=0, extra={"is": "seconds"})]
Size = Annotated[int | str, Meta(extra={"is": "bytes"})]
"""Bytes, or text such as "512MiB" or "2GiB"; the field becomes a number."""
FolderPath = Annotated[str, Meta(min_length=1, extra={"is": "a folder's path"})]
FilePath = Annotated[str, Meta(min_length=1, extra={"is": "a file's path"})]


def check_fields(struct: msgspec.Struct, error: type[AioEngineError] = ConfigError) -> None:
    """Raise ``error`` for the first field that is not of its annotated type, or out of its range or choices,
    and turn sizes into bytes. Fields of other types than these are left to the caller: numbers, bool,
    ``Literal``, the types above, and unions of them with None."""
    for field, kinds in _kinds_of(type(struct)):
        value = getattr(struct, field)
        found = _checked(field, value, kinds, error)
        if found is not value:
            msgspec.structs.force_setattr(struct, field, found)


@functools.cache
def _kinds_of(cls: type[msgspec.Struct]) -> list[tuple[str, list[tuple[str, inspect.Type]]]]:
    """Return the fields that can be checked, each with what its value may be."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    hints = get_type_hints(cls)
    fields = ((field.name, _kinds(field.type, hints[field.name])) for field in info.fields)
    return [(name, kinds) for name, kinds in fields if kinds and all(kind for kind, _ in kinds)]


def _kinds(type_: inspect.Type, hint: Any) -> list[tuple[str, inspect.Type]]:
    """Return the kinds of a type, with each; "" for one that is not checked here. ``hint`` is as it is
    written, because msgspec sorts the values of a ``Literal``."""
    match type_:
        case inspect.UnionType(types):
            return [kind for one in types for kind in _kinds(one, hint)]
        case inspect.Metadata(type=inner, extra={"is": "bytes" | "seconds" as kind}):
            return [(kind, inner)]
        case inspect.Metadata(extra={"one of": values}):
            return [("choice", inspect.LiteralType(values))]
        case inspect.Metadata(type=inspect.StrType(), extra={"is": str()}):
            return [("text", type_)]
        case inspect.IntType():
            return [("integer", type_)]
        case inspect.FloatType():
            return [("number", type_)]
        case inspect.BoolType():
            return [("bool", type_)]
        case inspect.LiteralType(values):
            literals = [get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
            written = next(found for found in literals if set(found) == set(values))
            return [("choice", inspect.LiteralType(written))]
        case inspect.NoneType():
            return [("none", type_)]
    return [("", type_)]


def _checked(
    field: str, value: Any, kinds: list[tuple[str, inspect.Type]], error: type[AioEngineError]
) -> Any:
    """Return the value as the field holds it. Raises ``error`` if it is of none of the kinds."""
    by_name = dict(kinds)
    optional = ", or None" if "none" in by_name else ""
    if (value is None and optional) or ("bool" in by_name and isinstance(value, bool)):
        return value
    kind, type_ = kinds[0]
    match type_:
        case inspect.LiteralType(values) if not any(value == v and type(value) is type(v) for v in values):
            if "bool" in by_name:
                raise error(f"{field}={value!r}: must be {values[0]!r}, True or False")
            hint = "" if isinstance(value, bool) else nearest(value, values)
            raise error(
                f"{field}={value!r}: allowed are {', '.join(map(str, values))}; choose one of them{hint}"
            )
        case inspect.BoolType():
            raise error(f"{field}={value!r}: must be True or False")
        case inspect.IntType(ge=low, le=high):
            check_integer(field, value, low=low, high=high, error=error)
        case inspect.FloatType() if kind == "seconds":
            check_seconds(field, value, optional, finite=True, error=error)
        case inspect.FloatType(ge=low, le=high, gt=above):
            bottom = above if low is None else low
            check_number(
                field,
                value,
                low=-math.inf if bottom is None else bottom,
                high=math.inf if high is None else high,
                above=low is None and above is not None,
                error=error,
            )
        case inspect.Metadata(extra={"is": what}) if not (isinstance(value, str) and value) or "\0" in value:
            raise error(f"{field}={value!r}: must be {what}{optional}")
    return parse_bytes(value, field=field) if kind == "bytes" else value


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


def file_url_path(text: str) -> str | None:
    """Return the path in a URL "file:///absolute/path", or None for other text. Raises ValueError if it names
    another machine."""
    if not text.lower().startswith("file://"):
        return None
    url = urlsplit(text)
    if url.netloc not in ("", "localhost"):
        raise ValueError(f"file://{url.netloc}: must be file:///absolute/path")
    return unquote(url.path)


def format_bytes(value: float) -> str:
    """Return the bytes as people read them: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _explain(error: msgspec.ValidationError) -> str:
    """Return the message with the field in front: "lora.max_loras: Expected `int`, got `str`". Errors of this
    package name the field already."""
    if isinstance(error.__cause__, ConfigError):
        return str(error.__cause__)
    text, at, place = str(error).rpartition(" - at `$.")
    return f"{place.rstrip('`')}: {text}" if at else str(error)


def nearest(value: object, allowed: Collection[Any]) -> str:
    """Return " (did you mean 'lru'?)", or "" if nothing is near; for a number, its two neighbours."""
    if isinstance(value, int):
        around = [max((a for a in allowed if a < value), default=None)]
        around.append(min((a for a in allowed if a > value), default=None))
        return f" (did you mean {' or '.join(str(a) for a in around if a is not None)}?)"
    return _nearest_name(str(value), [str(a) for a in allowed])


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not valid TOML: {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file with a JSON object. Raises ConfigError if it cannot be read or has something else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


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


def from_plain(cls: type[S], values: Mapping[str, Any], source: str) -> S:
    """Convert plain data, such as a parsed TOML file, to a struct. Raises ConfigError, which begins with
    ``source`` and names a field that is unknown."""
    refuse_unknown(cls, values, source)
    try:
        for field, kinds in _kinds_of(cls):
            if field in values:
                _checked(field, values[field], kinds, ConfigError)
        return msgspec.convert(dict(values), cls)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


def refuse_unknown(cls: type[msgspec.Struct], values: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for a key that is no field of ``cls``; it names the nearest field."""
    fields = list(cls.__struct_fields__)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"{source}: unknown field {key!r}{nearest(key, fields)}; "
                f"fields of {cls.__name__}: {', '.join(fields)}"
            )
