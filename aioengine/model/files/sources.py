"""Places that models and adapters are fetched from: the Hugging Face Hub (extra ``hub``), and URLs as fsspec
has them; and the folder for what can be fetched again."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aioengine.errors import ConfigError

PREFIX = "hf:"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+")
_HUB_ID = re.compile(r"(?:hf:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def is_source(path: str) -> bool:
    """Whether ``path`` names something that is fetched into a local folder first: "hf:...", or a URL."""
    return path.startswith(PREFIX) or _URL.fullmatch(path) is not None


class HubId(NamedTuple):
    """A repository ("owner/name") and, if one was given, its branch, tag or commit."""

    repo: str
    revision: str | None


def parse_hub_id(text: str) -> HubId | None:
    """Parse "owner/name" or "owner/name@revision", with or without "hf:" before it; None for anything
    else."""
    match = _HUB_ID.fullmatch(text)
    return None if match is None else HubId(match[1], match[2])


def has_hub() -> bool:
    """Whether ``huggingface_hub`` is installed."""
    return importlib.util.find_spec("huggingface_hub") is not None


def download(hub_id: HubId, patterns: Sequence[str], *, local_files_only: bool = False) -> Path:
    """Download the repository's files that match ``patterns``, and return their folder in the local cache.

    Cached files are not fetched again; if the Hub cannot be reached, cached files are used. Blocking.
    Raises ImportError, or one of the many types that ``huggingface_hub`` raises.
    """
    from huggingface_hub import snapshot_download  # optional

    found = snapshot_download(
        hub_id.repo,
        revision=hub_id.revision,
        allow_patterns=list(patterns),
        local_files_only=local_files_only,
    )
    return Path(found)


def explain(error: Exception) -> str:
    """Say that :func:`download` raised ``error``, whose text says what to do about it, in one line."""
    return f"it cannot be downloaded from the Hub: {type(error).__name__}: {' '.join(str(error).split())}"


_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra that it needs."""


def check_protocol(url: str, field: str = "url") -> None:
    """Raise ConfigError if fsspec, or the package that it needs for this kind of URL, is not installed.

    ``field``: what the URL, or the path of a local folder, was given as.
    """
    given = f"{field}={without_credentials(url)!r}"
    try:
        from fsspec import get_filesystem_class  # optional
    except ImportError:
        raise ConfigError(f"{given}: needs pip install 'aioengine[fsspec]'") from None
    protocol = url.partition("://")[0].lower() if "://" in url else "file"
    try:
        get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(f"{given}: {error}") from error
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        todo = f"needs pip install 'aioengine[{extra}]'" if extra else str(error)
        raise ConfigError(f"{given}: {todo}") from error


def why_failed(error: Exception) -> tuple[str, bool]:
    """Say why a filesystem failed, and what to do. Returns the text, and whether it was refused: then it is
    in vain to try again before something is changed.

    Each filesystem raises its own types, of packages that need not be installed: gcsfs an OSError of this
    text, or a type with a ``code``, and the packages for credentials have them in their types' names.
    """
    kind = type(error).__name__
    code = str(getattr(error, "code", getattr(error, "status", None)))
    if (
        isinstance(error, PermissionError)
        or code in ("401", "403")
        or (isinstance(error, OSError) and str(error).startswith("Forbidden"))
    ):
        text = " ".join(str(error).split())
        return f"access is denied ({text}); check the credentials of this server and what they may do", True
    if "Credential" in kind:
        return f"there are no valid credentials ({error}); set them in this server's environment", True
    return f"{kind}: {error}", False


def without_credentials(url: str) -> str:
    """Return the URL without a user's name and password, for messages."""
    return re.sub(r"//[^/@]*@", "//", url)


def cache_root() -> Path:
    """Return the folder for what can be made or fetched again: ``$XDG_CACHE_HOME/aioengine``."""
    # The XDG base directory specification: a relative value is to be ignored.
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "aioengine"
