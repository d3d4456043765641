"""Ray as it is found before it is joined: whether it is installed, and whether its head answers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from aioengine.errors import ConfigError

RAY_VERSION = (2, 60)
INSTALL = "pip install 'aioengine[fleet]'"
CONNECT_SECONDS = 5.0
_CERTIFICATES = ("CA_CERT", "SERVER_KEY", "SERVER_CERT")
_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""What Ray itself asks a head first. Without its field, the question has no bytes."""


def check_installed(what: str) -> None:
    """Raise ConfigError, with the command that installs it, if Ray is missing or has another version.
    ``what``: who needs it."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"{what} needs Ray, which is not installed: {INSTALL}")
    version = importlib.metadata.version("ray")
    if tuple(int(part) for part in version.split(".")[:2]) != RAY_VERSION:
        wanted = ".".join(map(str, RAY_VERSION))
        raise ConfigError(f"Ray {version} is installed, but {what} needs {wanted}: {INSTALL}")


def address() -> str | None:
    """Return the cluster that ``RAY_ADDRESS`` names; None if this process must start one."""
    found = os.environ.get("RAY_ADDRESS", "").strip()
    return None if found in ("", "local") else found


def check_address(where: str) -> None:
    """Check that Ray's head answers there, and takes this user's token if it asks for one. Ray itself would
    try for a minute, and then end this process. Raises ConfigError.

    From then on Ray shows the token, if there is one, as it does to a cluster that it starts here."""
    if where == "auto" or "://" in where:
        return
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"RAY_ADDRESS={where}: must be HOST:PORT, as `ray start --head` prints it, or auto")
    why = refusal(where, CONNECT_SECONDS)
    if why is not None:
        raise ConfigError(
            f"RAY_ADDRESS={where}: no head of Ray answers there that takes this process ({why}); give the "
            "address that `ray start --head` has printed, with the cluster's own token (RAY_AUTH_TOKEN, or "
            "~/.ray/auth_token), RAY_USE_TLS and certificates, or unset RAY_ADDRESS to start Ray here"
        )
    if _token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _token() -> str:
    """Return this user's token, which Ray makes where it first starts; "" if there is none."""
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    try:
        return (os.environ.get("RAY_AUTH_TOKEN") or Path(file).read_text()).strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _certificates() -> list[str] | None:
    """Return the files with which processes of the cluster speak TLS; None if they do not."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    return [os.environ[f"RAY_TLS_{name}"] for name in _CERTIFICATES]


def refusal(where: str, seconds: float) -> str | None:
    """Ask the head for its cluster's id, as Ray does. Returns why there is no answer, or None. Blocks."""
    import grpc

    token = _token()
    try:
        files = _certificates()
        contents = None if files is None else [Path(file).read_bytes() for file in files]
    except (KeyError, OSError) as error:
        return f"RAY_USE_TLS is set, and a certificate cannot be read: {error}"
    direct = [("grpc.enable_http_proxy", 0)]  # as Ray's own
    if contents is None:
        channel = grpc.insecure_channel(where, direct)
    else:
        channel = grpc.secure_channel(where, grpc.ssl_channel_credentials(*contents), direct)
    shows = bool(token) and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    metadata = [("authorization", f"Bearer {token}")] if shows else []
    with channel:
        try:
            channel.unary_unary(_QUESTION)(b"", timeout=seconds, metadata=metadata)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"[:300]
    return None


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
