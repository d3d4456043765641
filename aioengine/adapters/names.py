"""Rules for the names and paths of adapters."""

from __future__ import annotations

import os
import re

from aioengine.adapters.resolvers.sources import checked_source
from aioengine.errors import AdapterConflict, AdapterInvalid
from aioengine.model.files.sources import is_source

NAME_RULE = re.compile(r"(?!(?:.*/)?\.{0,2}(?:/|\Z))[A-Za-z0-9_][A-Za-z0-9_.:/+\-]{0,254}")
"""A proxy would take a name with an empty part, "." or ".." for another one."""
NAME_RULE_TEXT = (
    "1 to 255 letters, digits and _ . : / + -, beginning with a letter, digit or _, and no part between its "
    "slashes is empty, . or .."
)


def checked_path(name: str, path: str | os.PathLike[str]) -> str:
    """Return the absolute path, or the source ("hf:owner/name", a URL) as it is. Raises AdapterInvalid;
    ConfigError if what the source needs is not installed."""
    try:
        where = os.fspath(path)
    except TypeError:
        where = None
    if not isinstance(where, str) or not where or "\0" in where:
        raise AdapterInvalid(f"path={path!r}: must be a folder's path, as str or os.PathLike", name=str(name))
    check_name(name, where)
    if is_source(where):
        where = checked_source(name, where)
        if is_source(where):
            return where
    return os.path.abspath(os.path.expanduser(where))


def check_name(name: str, path: str) -> None:
    """Raise AdapterInvalid for a text that cannot be an adapter's name."""
    if not isinstance(name, str) or NAME_RULE.fullmatch(name) is None:
        raise AdapterInvalid(f"a name is {NAME_RULE_TEXT}", name=str(name), path=path)


def check_same_path(name: str, registered: str, path: str) -> None:
    if registered != path:
        raise AdapterConflict(
            f"already registered from {registered}; pass replace=True to load_adapter to put a new version "
            "in its place, or unload_adapter first",
            name=name,
            path=path,
        )
