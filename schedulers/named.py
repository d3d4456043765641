"""Builds classes named by text, with options: "vtc:input_weight=1", "package.module:Class:x=2"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import msgspec

from aioengine.schedulers.checks import nearest

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


def import_class(what: str, target: str, *bases: type[Any]) -> type[Any]:
    """Import the class at "module:Class" or "file.py:Class". Raises ValueError if it cannot be imported, or
    is not a subclass of one of ``bases``."""
    module, _, attribute = target.partition(":")
    try:
        if module.endswith(".py"):
            found = import_file(module, attribute)
        else:
            found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what}: cannot import {target}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever somebody's module does when it is imported
        raise ValueError(f"{what}: cannot import {target}: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, bases)):
        names = " or ".join(base.__name__ for base in bases)
        raise ValueError(f"{what}: {target} is not a subclass of {names}")
    return found


def unknown(name: str, known: Collection[str]) -> str:
    """Describe an unknown name: the nearest known one, and the valid ones."""
    hint = nearest(name, known)
    names = ", ".join(sorted(known))
    return f"there is no {name!r}{hint}; known are {names}, or give 'package.module:Class' or 'file.py:Class'"


def build(what: str, cls: type[Any], options: Mapping[str, Any], supply: Supply | None) -> Any:
    """Build an instance; its options are checked and converted by the types of its constructor. Raises
    ValueError, which begins with ``what``."""
    fields = constructor_options(cls)
    for key in options:
        if key not in fields:
            hint = nearest(key, fields)
            takes = ", ".join(fields) or "no options"
            raise ValueError(f"{what}: unknown option {key!r}{hint}; it takes {takes}")
    values: dict[str, Any] = {}
    for key, value in options.items():
        try:
            values[key] = msgspec.convert(value, fields[key][0], strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"{what}: option {key}={value!r}: {error}") from error
    values |= {key: make() for key, make in (supply or {}).items() if key in fields and key not in values}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:  # whatever somebody's constructor does
        raise ValueError(f"{what}: cannot be built: {type(error).__name__}: {error}") from error


def constructor_options(cls: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Return the constructor's options: name -> (type, default)."""
    if cls.__init__ is object.__init__:
        return {}
    try:
        hints = get_type_hints(cls.__init__)
    except Exception:  # an annotation that exists for type checkers only
        hints = {}
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: (hints.get(p.name, Any), p.default) for p in parameters}


def options_text(cls: type[Any]) -> str:
    """Describe the options as in "max_wait: float = 1.0"; empty if it takes none."""
    options = []
    for option, (hint, default) in constructor_options(cls).items():
        shown = str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))
        shown = re.sub(r"[a-z_.]+\.([A-Z])", r"\1", shown)
        options.append(
            f"{option}: {shown}" + ("" if default is inspect.Parameter.empty else f" = {default!r}")
        )
    return ", ".join(options)


def summary(cls: type[Any]) -> str:
    """Return the first paragraph of its docstring on one line."""
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def import_file(path: str, attribute: str) -> Any:
    """Return the object that the Python file defines under this name; ``path`` is relative to the working
    directory.

    The file is run once, and again when it has changed. Raises ImportError if there is none or it fails,
    AttributeError if it does not define the name.
    """
    module = _module(Path(path).expanduser().resolve())
    try:
        return getattr(module, attribute)
    except AttributeError:
        here = [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        hint = nearest(attribute, here)
        raise AttributeError(
            f"{module.__file__} defines no {attribute!r}{hint}; its classes: {', '.join(here) or 'none'}"
        ) from None


def _module(path: Path) -> ModuleType:
    # A unique name: two files called policy.py are two modules, and neither hides an installed one.
    name = f"_aioengine_policy_{blake2b(os.fsencode(path), digest_size=8).hexdigest()}"
    try:
        status = path.stat()
    except OSError as error:
        raise ImportError(f"there is no file {path}: {error.strerror}") from error
    stamp = (status.st_mtime_ns, status.st_size)
    known = sys.modules.get(name)
    if known is not None and getattr(known, "_aioengine_stamp", None) == stamp:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    vars(module)["_aioengine_stamp"] = stamp
    sys.modules[name] = module  # before it runs, because annotations are looked up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ImportError(f"{path} failed: {type(error).__name__}: {error}") from error
    return module
