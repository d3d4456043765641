"""Builds classes named by text, with options: "vtc:input_weight=1", "package.module:Class:x=2"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import msgspec

from aioengine.schedulers.checks import error_text, nearest

Supply = Mapping[str, Callable[[], Any]]
"""Factories by the name of a constructor's parameter, for values that text cannot express."""


def parse_named(what: str, token: str, known: Collection[str]) -> tuple[str, dict[str, Any]]:
    """Parse "gdsf:x=1,y=2" to ("gdsf", {"x": "1", "y": "2"}); "module:Class:x=1" likewise.

    Raises ValueError, which begins with ``what``, for an option without a value."""
    name, _, rest = token.strip().partition(":")
    first = rest.split(",")[0]
    if rest and "=" not in first.partition(":")[0] and name not in known:  # a dotted path
        attribute, _, rest = rest.partition(":")
        name = f"{name}:{attribute}"
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"{what}: option {item!r} is not of the form name=value")
        options[key.strip()] = value.strip()
    return name, options


def import_class(what: str, target: str) -> type[Any]:
    """Import the class at "module:Class" or "file.py:Class", where the file is relative to the working
    directory. Raises ValueError if it cannot be imported."""
    name, _, attribute = target.partition(":")
    try:
        is_file = name.endswith(".py")
        module = _file(Path(name).expanduser().resolve()) if is_file else importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever somebody's module does when it is imported
        raise ValueError(f"{what}: cannot import {target}: {error_text(error)}") from error
    found = getattr(module, attribute, None)
    if not inspect.isclass(found):
        classes = [
            key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        ]
        hint = f"{nearest(attribute, classes)}; it defines {', '.join(classes) or 'nothing'}"
        raise ValueError(f"{what}: cannot import {target}: there is no {attribute!r}{hint}")
    return found


def _file(path: Path) -> ModuleType:
    """Return the module of a Python file, which is run once, and again when it has changed."""
    # A unique name: two files called policy.py are two modules, and neither hides an installed one.
    stamp = f"{path}:{path.stat().st_mtime_ns}"
    name = f"_aioengine_policy_{blake2b(stamp.encode(), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "its name ends in .py"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # annotations are looked up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def build(what: str, cls: type[Any], options: Mapping[str, Any], supply: Supply | None) -> Any:
    """Build an instance; its options are checked and converted by the types of its constructor. Raises
    ValueError, which begins with ``what``."""
    try:
        hints = get_type_hints(cls.__init__)
    except Exception:  # an annotation that exists for type checkers only
        hints = {}
    types = {name: hints.get(name, Any) for name in inspect.signature(cls).parameters}
    values: dict[str, Any] = {key: make() for key, make in (supply or {}).items() if key in types}
    for key, value in options.items():
        if key not in types:
            takes = ", ".join(types) or "no options"
            raise ValueError(f"{what}: unknown option {key!r}{nearest(key, types)}; it takes {takes}")
        try:
            values[key] = msgspec.convert(value, types[key], strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"{what}: option {key}={value!r}: {error}") from error
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:  # whatever somebody's constructor does
        raise ValueError(f"{what}: cannot be built: {error_text(error)}") from error
