"""Adapters from object stores and other remote places, through fsspec, by way of a local cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.adapters.peft.folder import CONFIG_FILE, NO_WEIGHTS, SAFETENSORS_FILE, failed, invalid, naming
from aioengine.adapters.resolvers.base import BlockingResolver, check_size, is_plain_name
from aioengine.checks import parse_bytes
from aioengine.errors import AdapterError, AdapterLoadError, AdapterNotFound, ConfigError
from aioengine.model.files.sources import cache_root, check_protocol, why_failed, without_credentials

KEEP_SECONDS = 3600.0
"""Copies that were asked for within this time are kept even beyond the bound, because they are about to be
read."""
_PIECE = 1 << 20
_UNFINISHED = ".part-"
_COPY = re.compile(rf"[0-9a-f]{{32}}/([0-9a-f]{{32}}|{re.escape(_UNFINISHED)}.*)")


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
    "memory://". An adapter's two files are fetched into a folder ``cache_dir/KEY/KEY``; the second key is of
    the objects' ETags (or, without these, of other values that change with an object). So changed objects are
    fetched into another folder, and an adapter that is being served keeps its own. A copy is complete or not
    there, however many processes share the cache. If it is gone when an adapter must be read again, its
    requests fail and the next one fetches it anew. (fsspec's ``filecache`` has no bound, no lock between
    processes, and no folder for the files of one version.)

    Args:
        url: Where the adapters are.
        cache_dir: ``$XDG_CACHE_HOME/aioengine/adapters`` if None.
        storage_options: For the filesystem: credentials, endpoint, ...
        max_cache_bytes: Bound on all copies in ``cache_dir``; bytes, text such as "2GiB", or None for no
            bound. Beyond it, those that were resolved least recently are deleted, but none of the last hour.

    Raises ConfigError if fsspec, or the package that it needs for this kind of URL, is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        storage_options: dict[str, Any] | None = None,
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
        self._most = (
            None if max_cache_bytes is None else parse_bytes(max_cache_bytes, field="max_cache_bytes")
        )
        self._cache = cache_root() / "adapters" if cache_dir is None else Path(cache_dir).expanduser()

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
                copy = self._cache / _key(where) / _key(content)
                if not _use(copy, remote):
                    self._copy(folder, remote, copy)
                    self._prune(keep=copy)
                return copy
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
            check_size(found.file, found.size)
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

    def _copy(self, folder: str, remote: Sequence[_Remote], copy: Path) -> None:
        """Fetch a copy. One process at a time does so for an adapter."""
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(copy.parent):
            if _use(copy, remote):  # another process has fetched it meanwhile
                return
            shutil.rmtree(copy, ignore_errors=True)  # somebody has deleted a part of it
            with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=copy.parent) as staging:
                self._fetch(folder, remote, Path(staging))
                os.rename(staging, copy)

    def _fetch(self, folder: str, remote: Sequence[_Remote], to: Path) -> None:
        for found in remote:
            with self._fs.open(found.path, "rb") as source, (to / found.file).open("xb") as target:
                while piece := source.read(_PIECE):
                    target.write(piece)
                    check_size(found.file, target.tell())
        if self._look(folder) != remote:
            failed("it changed while it was fetched; try again", transient=True)

    def _prune(self, *, keep: Path) -> None:
        """Delete the least recently used copies, and what killed processes have left, until the bound holds.
        What cannot be deleted stays, and so does everything else in the folder."""
        copies = list[tuple[float, int, Path]]()
        for copy in () if self._most is None else self._cache.glob("*/*"):
            with suppress(OSError):  # it may be deleted meanwhile
                if _COPY.fullmatch(str(copy.relative_to(self._cache))) and not copy.is_symlink():
                    size = sum(file.stat().st_size for file in copy.iterdir())
                    copies.append((copy.stat().st_mtime, size, copy))
        left = sum(size for _, size, _ in copies) - (self._most or 0)
        for used, size, copy in sorted(copies):
            if left <= 0 or time.time() - used < KEEP_SECONDS:
                return
            with suppress(OSError), _locked(copy.parent, fcntl.LOCK_NB):  # else one of it is being fetched
                if copy != keep and copy.stat().st_mtime == used:
                    shutil.rmtree(copy, ignore_errors=True)
                    left -= 0 if copy.exists() else size


@contextmanager
def _locked(folder: Path, more: int = 0) -> Iterator[None]:
    """Hold the lock of an adapter's copies, which ends with the process, too."""
    with (folder / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | more)
        yield


def _use(copy: Path, remote: Sequence[_Remote]) -> bool:
    """Mark a copy as used now; returns whether it is there, as a whole."""
    if not all((copy / found.file).is_file() for found in remote):
        return False
    with suppress(OSError):  # another user's, or on a read-only disk
        os.utime(copy)
    return True


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
