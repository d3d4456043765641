"""Ray as it is found before it is joined: whether it is installed, and whether its head answers."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import socket
import ssl
import sys
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
    """Check that Ray's head answers there, and takes this user's token if it asks for one; from then on Ray
    shows the token. Raises ConfigError.

    Ray itself would try for a minute, and then end this process.
    """
    if where == "auto" or "://" in where:
        return
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"RAY_ADDRESS={where}: must be HOST:PORT, as `ray start --head` prints it, or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            pass
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS={where}: nothing answers there ({error}); start Ray with `ray start --head`, or "
            "unset RAY_ADDRESS to start Ray on this machine"
        ) from error
    _show_token()
    answer = _ask(where)
    if answer == "UNAUTHENTICATED":
        file = _token_file()
        if not _token():
            why = f"there is none in {file}; copy that file from the cluster's head, or set RAY_AUTH_TOKEN"
        elif not _shows_token():
            why = f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} shows none; unset it"
        else:
            held = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else file
            why = f"refuses the one in {held}; take the one of the cluster's head"
        raise ConfigError(f"RAY_ADDRESS={where}: the cluster asks for a token, and {why}")
    if answer in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"):
        tls = "with TLS, as RAY_USE_TLS says" if _has_tls() else "without TLS, as RAY_USE_TLS is not set"
        raise ConfigError(
            f"RAY_ADDRESS={where}: what listens there does not answer as Ray's head does ({tls}); give the "
            "address that `ray start --head` has printed, and the cluster's own RAY_USE_TLS and certificates"
        )


def _show_token() -> None:
    """Have this process show this user's token, if there is one, as it does where it starts Ray itself. Ray
    shows none to a cluster that is named by its address, unless ``RAY_AUTH_MODE`` says so."""
    if "RAY_AUTH_MODE" not in os.environ and _token():
        os.environ["RAY_AUTH_MODE"] = "token"
        if "ray" in sys.modules:  # it reads its variables at import
            importlib.import_module("ray._raylet").Config.initialize("")


def _shows_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _token() -> str:
    """Return this user's token, which Ray makes where it first starts; "" if there is none."""
    try:
        return (os.environ.get("RAY_AUTH_TOKEN") or _token_file().read_text()).strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _has_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def tls_context() -> ssl.SSLContext | None:
    """Return how to speak TLS to a process of the cluster; None if the cluster does not."""
    if not _has_tls():
        return None
    authority, key, cert = (os.environ[f"RAY_TLS_{name}"] for name in _CERTIFICATES)
    context = ssl.create_default_context(cafile=authority)
    context.check_hostname = False  # Ray checks the names
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(cert, key)
    return context


def _ask(where: str) -> str:
    """Ask the head for its cluster's id, with TLS and the token if this process is told to use them. Returns
    "OK", or gRPC's name of what is wrong. Raises ConfigError if a certificate cannot be read."""
    import grpc

    if _has_tls():
        try:
            files = [Path(os.environ[f"RAY_TLS_{name}"]).read_bytes() for name in _CERTIFICATES]
        except (KeyError, OSError) as error:
            raise ConfigError(f"RAY_USE_TLS is set, and a certificate cannot be read: {error}") from error
        channel = grpc.secure_channel(where, grpc.ssl_channel_credentials(*files))
    else:
        channel = grpc.insecure_channel(where)
    metadata = [("authorization", f"Bearer {_token()}")] if _shows_token() else []
    with channel:
        try:
            channel.unary_unary(_QUESTION)(
                b"", timeout=CONNECT_SECONDS, metadata=metadata, wait_for_ready=True
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
