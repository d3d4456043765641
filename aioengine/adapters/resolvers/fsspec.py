"""Adapters from object stores and other remote places, through fsspec, by way of a local cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.adapters.peft.folder import CONFIG_FILE, NO_WEIGHTS, SAFETENSORS_FILE, failed, invalid, naming
from aioengine.adapters.resolvers.base import BlockingResolver, check_size, is_plain_name
from aioengine.adapters.resolvers.local_copies import LocalCopies
from aioengine.checks import parse_bytes
from aioengine.errors import AdapterError, AdapterLoadError, AdapterNotFound, ConfigError
from aioengine.model.files.cache import cache_root
from aioengine.model.files.remote import check_protocol, why_failed, without_credentials

_PIECE = 1 << 20


class _Remote(NamedTuple):
    """One object as it is now."""

    file: str
    path: str
    size: int
    stamp: str
    """A text that changes with the content."""


class FsspecResolver(BlockingResolver):
    """Resolves the adapter "team/sql" to the files under ``url``/team/sql (extra ``fsspec``).

    ``url`` is anything that fsspec knows: "s3://bucket/adapters" (extra ``s3``), "gs://" (extra ``gcs``),
    "memory://". An adapter's two files are fetched into a folder of ``cache_dir`` that is named after the
    objects' ETags (or, without these, after other values that change with an object). So changed objects are
    fetched into another folder, and an adapter that is being served keeps its own; see :class:`LocalCopies`.
    If the copy is gone when an adapter must be read again, its requests fail and the next one fetches it
    anew.

    Args:
        url: Where the adapters are.
        cache_dir: ``$XDG_CACHE_HOME/aioengine/adapters`` if None.
        storage_options: For the filesystem: credentials, endpoint, ...
        max_bytes: The largest weights file that is fetched; bytes, or text such as "2GiB".
        max_cache_bytes: Bound on all copies in ``cache_dir``; None for no bound. Beyond it, those that were
            resolved least recently are deleted, but none of the last ten minutes.

    Raises ConfigError if fsspec, or the package that it needs for this kind of URL, is not installed.
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
        check_protocol(url)
        from fsspec.core import url_to_fs  # optional

        self._url = without_credentials(url).rstrip("/")
        try:
            self._fs, self._base = url_to_fs(url, **(storage_options or {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"url={self._url!r}: {error}") from error
        self._max_bytes = parse_bytes(max_bytes, field="max_bytes")
        bound = None if max_cache_bytes is None else parse_bytes(max_cache_bytes, field="max_cache_bytes")
        root = cache_root() / "adapters" if cache_dir is None else Path(cache_dir).expanduser()
        self._copies = LocalCopies(root, bound)

    def find(self, name: str) -> Path:
        if not is_plain_name(name):
            raise AdapterNotFound("not a name below the adapters' URL", name=name)
        return self.fetch(name, name)

    def fetch(self, name: str, folder: str) -> Path:
        """Return the local copy of ``folder``, a path below the URL, for the adapter ``name``. Fetches it if
        there is none. Blocks.

        Raises AdapterNotFound, AdapterInvalid, AdapterLoadError.
        """
        where = f"{self._url}/{folder}"
        with naming(name, where):
            try:
                remote = self._look(folder)
                content = "\n".join(f"{r.file} {r.size} {r.stamp}" for r in remote)
                return self._copies.get(
                    _key(where), _key(content), lambda staging: self._fetch(folder, remote, staging)
                )
            except AdapterError:
                raise
            except Exception as error:  # each filesystem raises its own types
                reason, refused = why_failed(error)
                text = reason if refused else f"cannot be fetched: {reason}"
                raise AdapterLoadError(text, name="", transient=not refused) from error

    def _look(self, folder: str) -> list[_Remote]:
        """Return the adapter's objects as they are now."""
        self._fs.invalidate_cache()  # cached listings would hide changes
        config = self._info(folder, CONFIG_FILE)
        if config is None:
            reason = f"there is no {CONFIG_FILE}"
            if not self._fs.exists(self._base):  # nor the bucket, perhaps
                reason += f", and nothing else at {self._url}: check the bucket's name, and the endpoint"
            raise AdapterNotFound(reason, name="")
        weights = self._info(folder, SAFETENSORS_FILE)
        if weights is None:
            invalid(NO_WEIGHTS)
        for found in (config, weights):
            check_size(found.file, found.size, self._max_bytes)
        return [config, weights]

    def _info(self, folder: str, file: str) -> _Remote | None:
        path = f"{self._base.rstrip('/')}/{folder}/{file}"
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

    def _fetch(self, folder: str, remote: list[_Remote], to: Path) -> None:
        for found in remote:
            with self._fs.open(found.path, "rb") as source, (to / found.file).open("xb") as target:
                while piece := source.read(_PIECE):
                    target.write(piece)
                    check_size(found.file, target.tell(), self._max_bytes)
        if self._look(folder) != remote:
            failed("it changed while it was fetched; try again", transient=True)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
