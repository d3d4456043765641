"""Names of adapters, and where they come from: "hf:owner/name", "s3://bucket/sql", "gs://...", "file://..."."""

from __future__ import annotations

import os
import re
from pathlib import Path

from aioengine.adapters.resolvers.base import is_plain_path
from aioengine.adapters.resolvers.fsspec import FsspecResolver
from aioengine.adapters.resolvers.hub import HubResolver, parse_hub_path
from aioengine.checks import file_url_path
from aioengine.errors import AdapterConflict, AdapterInvalid, AdapterNotFound, ConfigError
from aioengine.model.files.sources import PREFIX, check_protocol, has_hub, is_source

NAME_RULE = re.compile(r"(?!(?:.*/)?\.{0,2}(?:/|\Z))[A-Za-z0-9_][A-Za-z0-9_.:/+\-]{0,254}")
"""A proxy would take a name with an empty part, "." or ".." for another one."""
NAME_RULE_TEXT = (
    "1 to 255 letters, digits and _ . : / + -, beginning with a letter, digit or _, and no part between its "
    "slashes is empty, . or .."
)


def checked_path(name: str, path: str | os.PathLike[str]) -> str:
    """Return the absolute path, or the source in its usual form: "hf:owner/name", or a URL that is none of
    this machine. Raises AdapterInvalid; ConfigError if a package that the source needs is not installed."""
    try:
        where = os.fspath(path)
    except TypeError:
        where = None
    if not isinstance(where, str) or not where or "\0" in where:
        raise AdapterInvalid(f"path={path!r}: must be a folder's path, as str or os.PathLike", name=str(name))
    check_name(name, where)
    if where.startswith("hf://"):
        where = PREFIX + where.removeprefix("hf://")
    if where.startswith(PREFIX):
        parse_hub_path(name, where)
        if not has_hub():
            raise ConfigError(f"adapter {name!r} ({where}): needs pip install 'aioengine[hub]'")
        return where
    try:
        local = file_url_path(where)
    except ValueError as error:
        raise AdapterInvalid(str(error), name=name, path=where) from error
    if local is None and is_source(where):
        check_protocol(where)
        return where.rstrip("/")
    return os.path.abspath(os.path.expanduser(local or where))


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


def source_below(root: str, name: str, path: str) -> str | None:
    """Return the URL of ``path`` below the URL ``root``, or None if ``root`` is a folder on this machine.

    Raises AdapterNotFound for a path that is not below it, or that means something else in a URL.
    """
    if not is_source(root):
        return None
    root = root.rstrip("/")
    below = path.removeprefix(f"{root}/").removeprefix("./").rstrip("/")
    if not is_plain_path(below):
        raise AdapterNotFound("not a path below adapter_root", name=name, path=path)
    return f"{root}/{below}"


def fetch_source(name: str, source: str) -> Path:
    """Return a local folder with the content of ``source``, for the adapter ``name``. It is fetched with the
    credentials and endpoints of the environment, and stays in the Hub's cache, or that of URLs. Blocks.

    Raises AdapterNotFound, AdapterInvalid, AdapterLoadError; ConfigError if an extra is missing.
    """
    if source.startswith(PREFIX):
        return HubResolver().fetch(name, source)
    parent, _, last = source.rpartition("/")
    return FsspecResolver(parent).fetch(name, last)
