"""URLs of object stores and other remote places, as fsspec has them: what is missing, and why one failed."""

from __future__ import annotations

import re

from aioengine.errors import ConfigError

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
