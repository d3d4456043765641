"""Adapters from object stores and other remote places, through fsspec, by way of a local cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from aioengine.adapters.peft.folder import CONFIG_FILE, MAX_CONFIG_BYTES
from aioengine.adapters.resolvers.base import WEIGHTS_FILES, BlockingResolver, is_plain_name, too_large
from aioengine.adapters.resolvers.local_copies import LocalCopies
from aioengine.config import format_bytes, parse_bytes
from aioengine.errors import AdapterError, AdapterInvalid, AdapterLoadError, AdapterNotFound, ConfigError
from aioengine.model.files.cache import cache_root

_PIECE = 1 << 20


class _Remote(NamedTuple):
    """One object as it is now."""

    file: str
    path: str
    size: int
    stamp: str
    """A text that changes with the content."""


class FsspecResolver(BlockingResolver):
    """The adapter "team/sql" is what lies under ``url``/team/sql (extra ``fsspec``).

    ``url`` is anything that fsspec knows ("s3://bucket/adapters" with s3fs installed, "gs://", "memory://").
    An adapter's two files are fetched into a folder of ``cache_dir`` that is named after the objects' ETags
    (where there are none, after what else tells that an object has changed). So a resolve only asks for the
    objects' state; changed objects are fetched into another folder, and an adapter that is being served keeps
    its own. A folder is complete or not there: it is filled under another name and then renamed, and several
    processes can share one cache. When it has grown beyond ``max_cache_bytes``, what was resolved least
    recently is deleted, but nothing that was within the last ten minutes. If the copy is gone when an adapter
    must be read again, its requests fail and the next one fetches it anew.

    Args:
        url: Where the adapters are.
        cache_dir: ``$XDG_CACHE_HOME/aioengine/adapters`` if None.
        storage_options: For the filesystem: credentials, endpoint, ...
        max_bytes: The largest weights file that is fetched; bytes, or text such as "2GiB".
        max_cache_bytes: Bound on all copies in ``cache_dir``; None for no bound.

    Raises ConfigError if fsspec, or what it needs for this kind of URL, is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        storage_options: dict[str, Any] | None = None,
        max_bytes: int | str = "4GiB",
        max_cache_bytes: int | str | None = "64GiB",
    ) -> None:
        super().__init__()
        try:
            from fsspec.core import url_to_fs  # optional
        except ImportError:
            raise ConfigError(f"adapters from {_public(url)} need: pip install 'aioengine[fsspec]'") from None
        try:
            self._fs, self._base = url_to_fs(url, **(storage_options or {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"url={_public(url)!r}: {error}") from error
        self._url = _public(url).rstrip("/")
        self._max_bytes = parse_bytes(max_bytes, field="max_bytes")
        bound = None if max_cache_bytes is None else parse_bytes(max_cache_bytes, field="max_cache_bytes")
        root = cache_root() / "adapters" if cache_dir is None else Path(cache_dir).expanduser()
        self._copies = LocalCopies(root, bound)

    def find(self, name: str) -> Path:
        if not is_plain_name(name):
            raise AdapterNotFound("not a name below the adapters' URL", name=name)
        where = f"{self._url}/{name}"
        try:
            remote = self._look(name)
            folder = self._folder(where, remote)
            if not self._copies.use(folder):
                self._fetch(name, where, remote, folder)
                self._copies.prune(keep=folder)
        except AdapterError:
            raise
        except Exception as error:  # each filesystem raises its own types
            raise AdapterLoadError(
                f"cannot be fetched: {type(error).__name__}: {error}", name=name, path=where, transient=True
            ) from error
        return folder

    def _look(self, name: str) -> list[_Remote]:
        """Return the adapter's objects as they are now."""
        self._fs.invalidate_cache()  # of listings, which would hide changes
        where = f"{self._url}/{name}"
        config = self._info(name, CONFIG_FILE)
        if config is None:
            raise AdapterNotFound(f"there is no {CONFIG_FILE}", name=name, path=where)
        weights = next((found for file in WEIGHTS_FILES if (found := self._info(name, file))), None)
        if weights is None:
            raise AdapterInvalid(f"there is none of {', '.join(WEIGHTS_FILES)}", name=name, path=where)
        for found in (config, weights):
            if (reason := too_large(found.file, found.size, self._max_bytes)) is not None:
                raise AdapterInvalid(reason, name=name, path=where)
        return [config, weights]

    def _info(self, name: str, file: str) -> _Remote | None:
        path = f"{self._base.rstrip('/')}/{name}/{file}"
        try:
            info = self._fs.info(path)
        except FileNotFoundError:
            return None
        if info.get("type") != "file":
            return None
        stamp = next(
            (str(info[key]) for key in ("ETag", "etag", "md5Hash", "content_md5") if info.get(key)), None
        )
        return _Remote(file, path, int(info.get("size") or 0), stamp or self._fs.ukey(path))

    def _folder(self, where: str, remote: list[_Remote]) -> Path:
        content = "\n".join(f"{r.file} {r.size} {r.stamp}" for r in remote)
        return self._copies.path(_key(where), _key(content))

    def _fetch(self, name: str, where: str, remote: list[_Remote], folder: Path) -> None:
        """Download into ``folder``, unless another process does so first."""
        staging = self._copies.staging(folder)
        try:
            for found in remote:
                limit = MAX_CONFIG_BYTES if found.file == CONFIG_FILE else self._max_bytes
                with self._fs.open(found.path, "rb") as source, (staging / found.file).open("xb") as target:
                    if not _copy(source, target, limit):
                        raise AdapterInvalid(
                            f"{found.file} has more than {format_bytes(limit)}", name=name, path=where
                        )
            if self._look(name) != remote:
                raise AdapterLoadError(
                    "it changed while it was fetched; try again", name=name, path=where, transient=True
                )
            try:
                staging.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                # Another process was first, with the same content.
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _copy(source: BinaryIO, target: BinaryIO, limit: int) -> bool:
    """Copy up to ``limit`` bytes. Returns False if there are more."""
    left = limit
    while piece := source.read(_PIECE):
        left -= len(piece)
        if left < 0:
            return False
        target.write(piece)
    return True


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _public(url: str) -> str:
    """Return the URL without credentials, for messages."""
    return re.sub(r"//[^/@]*@", "//", url)
