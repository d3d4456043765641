"""Checks of plain values from callers and files, with one wording for all of them."""

from __future__ import annotations

import functools
import json
import re
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta, inspect

from aioengine.errors import AioEngineError, ConfigError, RequestInvalid
from aioengine.schedulers.checks import error_text as error_text
from aioengine.schedulers.checks import nearest as _nearest_name

LARGEST = sys.float_info.max

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(gt=0, le=LARGEST, extra={"is": "more than 0 seconds"})]
AnySeconds = Annotated[float, Meta(gt=0, extra={"is": "more than 0 seconds"})]
Size = Annotated[int | str, Meta(extra={"is": "bytes, or text such as '512MiB' or '2GiB'"})]
"""A size in memory; :func:`check_fields` makes it a number."""
_PATH = r"\A[^\0]+\Z"
FolderPath = Annotated[str, Meta(pattern=_PATH, extra={"is": "a folder's path"})]
FilePath = Annotated[str, Meta(pattern=_PATH, extra={"is": "a file's path"})]


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
        if isinstance(wrong.__cause__, AioEngineError):
            raise error(str(wrong.__cause__)) from wrong
        type_ = inspect.type_info(kind)
        for one in _kinds(type_):
            if isinstance(one, inspect.StructType) and isinstance(value, Mapping):
                for name, inner in _fields_of(one.cls).kinds.items():
                    if name in value:
                        check_value(f"{field}.{name}", value[name], inner, error, strict=strict)
        if at := re.search(r"\$\[(\d+)\]", str(wrong)):  # an item of a list
            field, value = f"{field}[{at[1]}]", value[int(at[1])]
            type_ = next(one.item_type for one in _kinds(type_) if isinstance(one, inspect.CollectionType))
        raise error(f"{field}={value!r}: {_allowed(kind, type_, value)}") from None
    return value


def _allowed(kind: Any, type_: inspect.Type, value: object) -> str:
    """Say what a field of this type may be, instead of ``value``."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal and len(get_args(part)) > 1:  # in their order, which ``type_`` has not
            return _choices(value, get_args(part))
    return f"must be {_what(type_, value)}"


def _choices(value: object, allowed: Collection[Any]) -> str:
    return f"allowed are {', '.join(map(str, allowed))}; choose one of them{nearest(value, allowed)}"


def check_choice(field: str, value: object, allowed: Collection[int]) -> None:
    """Raise ConfigError, naming ``field``, unless ``value`` is one of these numbers."""
    if type(value) is not int or value not in allowed:
        raise ConfigError(f"{field}={value!r}: {_choices(value, allowed)}")


def _what(type_: inspect.Type, value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    match type_:
        case inspect.Metadata(extra={"is": str(text)}):
            return text
        case inspect.Metadata(type=inner):
            return _what(inner, value)
        case inspect.UnionType(types):
            first, *others = types
            return _what(first, value) + "".join(
                f"{', ' if isinstance(one, inspect.BoolType) else ', or '}{_what(one, value)}"
                for one in others
            )
        case inspect.LiteralType(values):
            return repr(values[0])
        case inspect.IntType(ge=low, le=high):
            if low is None:
                return "an integer"
            bound = f">= {low}" if high is None else f"in {low}..{high}"
            return bound if isinstance(value, int) and is_number else f"an integer {bound}"
        case inspect.FloatType(ge=None, gt=None):
            return "a number"
        case inspect.FloatType() if not is_number:
            return "a finite number"
        case inspect.FloatType(ge=low, gt=above, le=high):
            least, open_ = (low, "[") if above is None else (above, "(")
            if high is None or high == LARGEST:
                return f"{'more than' if open_ == '(' else '>='} {least:g}"
            return f"in {open_}{least:g}, {high:g}]"
        case inspect.CollectionType(item_type=item):
            return f"a list, each of its items {_what(item, value)}"
        case inspect.DictType(value_type=item):
            return f"a table, each of its values {_what(item, value)}"
        case inspect.NoneType():
            return "None"
        case inspect.BoolType():
            return "True or False"
        case inspect.StrType(min_length=least):
            return "text that is not empty" if least else "text"
    return f"a {getattr(type_, 'cls', type(type_)).__name__}"


def _kinds(type_: inspect.Type) -> Sequence[inspect.Type]:
    """Return the types that a value may be of: several, if this is a union."""
    types = type_.types if isinstance(type_, inspect.UnionType) else (type_,)
    return [one.type if isinstance(one, inspect.Metadata) else one for one in types]


class _Fields(NamedTuple):
    """The fields of a struct, by name, with their types."""

    kinds: dict[str, Any]
    sizes: list[str]
    """Those that are a :data:`Size`."""
    same: type[msgspec.Struct]
    """A struct with these fields, without checks of its own."""


@functools.cache
def _fields_of(cls: type[msgspec.Struct]) -> _Fields:
    kinds = get_type_hints(cls, include_extras=True)
    kinds = {name: kinds[name] for name in cls.__struct_fields__}
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


def nearest(value: object, allowed: Collection[Any]) -> str:
    """Return " (did you mean 'lru'?)", or "" if nothing is near; for a number, its two neighbours."""
    if type(value) is int and all(isinstance(one, int) for one in allowed):
        around = [max((a for a in allowed if a < value), default=None)]
        around.append(min((a for a in allowed if a > value), default=None))
        return f" (did you mean {' or '.join(str(a) for a in around if a is not None)}?)"
    return _nearest_name(value, [str(a) for a in allowed]) if isinstance(value, str) else ""


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


def from_plain(cls: type[S], values: Mapping[str, Any], source: str, *, strict: bool = True) -> S:
    """Convert plain data, such as a parsed TOML file, to a struct; not ``strict``: also texts of numbers.
    Raises ConfigError, which begins with ``source`` and names a field that is unknown."""
    refuse_unknown(cls, values, source)
    try:
        return msgspec.convert(dict(values), cls, strict=strict)
    except msgspec.ValidationError as wrong:
        try:
            for field, value in values.items():
                check_value(field, value, _fields_of(cls).kinds[field], strict=strict)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from wrong
        raise ConfigError(f"{source}: {wrong.__cause__ or wrong}") from wrong


def refuse_unknown(cls: type[msgspec.Struct], values: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for a key that is no field of ``cls``; it names the nearest field."""
    fields = list(cls.__struct_fields__)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"{source}: unknown field {key!r}{nearest(key, fields)}; "
                f"fields of {cls.__name__}: {', '.join(fields)}"
            )
