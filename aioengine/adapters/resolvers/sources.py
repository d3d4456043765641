"""Adapters given by where they come from: "hf:owner/name", "s3://bucket/sql", "gs://...", "file://..."."""

from __future__ import annotations

from pathlib import Path

from aioengine.adapters.resolvers.base import SharedLookups, is_plain_path
from aioengine.adapters.resolvers.fsspec import FsspecResolver
from aioengine.adapters.resolvers.hub import HubResolver, parse_hub_path
from aioengine.checks import file_url_path
from aioengine.errors import AdapterInvalid, AdapterNotFound, ConfigError
from aioengine.model.files.sources import PREFIX, check_protocol, has_hub, is_source


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


class AdapterSources:
    """Fetches adapters by their sources, and keeps them in the caches of the Hub and of remote folders."""

    def __init__(self) -> None:
        self._lookups = SharedLookups()
        """Each with the credentials and endpoints of the environment."""

    async def resolve_path(self, name: str, source: str) -> Path:
        """Return a local folder with the content of ``source``, for the adapter ``name``.

        Raises AdapterNotFound, AdapterInvalid, AdapterLoadError; ConfigError if an extra is missing.
        """
        return await self._lookups.run(name, source, lambda: _fetch(name, source))


def _fetch(name: str, source: str) -> Path:
    if source.startswith(PREFIX):
        return HubResolver().fetch(name, source)
    parent, _, last = source.rpartition("/")
    return FsspecResolver(parent).fetch(name, last)
