"""Names of adapters, and where they come from: "hf:owner/name", "s3://bucket/sql", "gs://...", "file://..."."""

from __future__ import annotations

import os
import re
from pathlib import Path

from aioengine.adapters.resolvers.base import SharedLookups, is_plain_path
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


def checked_source(name: str, path: str) -> str:
    """Return the source in its usual form: a "file://" URL becomes a local path, and "hf://" becomes "hf:".

    Raises AdapterInvalid for a source of another form, and ConfigError if a package that it needs is not
    installed.
    """
    if path.startswith("hf://"):
        path = PREFIX + path.removeprefix("hf://")
    if path.startswith(PREFIX):
        parse_hub_path(name, path)
        if not has_hub():
            raise ConfigError(f"adapter {name!r} ({path}): needs pip install 'aioengine[hub]'")
        return path
    try:
        local = file_url_path(path)
    except ValueError as error:
        raise AdapterInvalid(str(error), name=name, path=path) from error
    if local is None:
        check_protocol(path)
        return path.rstrip("/")
    return local


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


class AdapterSources(SharedLookups):
    """Fetches adapters by their sources, with the credentials and endpoints of the environment, and keeps
    them in the caches of the Hub and of remote folders."""

    async def resolve_path(self, name: str, source: str) -> Path:
        """Return a local folder with the content of ``source``, for the adapter ``name``.

        Raises AdapterNotFound, AdapterInvalid, AdapterLoadError; ConfigError if an extra is missing.
        """
        return await self.run(name, source, lambda: _fetch(name, source))


def _fetch(name: str, source: str) -> Path:
    if source.startswith(PREFIX):
        return HubResolver().fetch(name, source)
    parent, _, last = source.rpartition("/")
    return FsspecResolver(parent).fetch(name, last)
