"""Policies in files that need not be installed: "my_policy.py:MyPolicy"."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from aioengine.schedulers.nearest import nearest


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
