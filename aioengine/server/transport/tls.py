"""TLS with a certificate that can be renewed while connections are open."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from aioengine.errors import ConfigError


class Loaded(NamedTuple):
    """A certificate as its files held it."""

    context: ssl.SSLContext
    content: bytes
    """The certificate's file, to tell a new one from the old."""


class Certificate:
    """A certificate with its key, from two PEM files. ``context`` is what a server listens with.

    Raises ConfigError on construction if the files cannot be used.
    """

    def __init__(self, cert: str, key: str) -> None:
        self._cert, self._key = cert, key
        self._current = self.read()
        self.context = self._current.context
        # Asked at each handshake, also of clients that name no server.
        self.context.sni_callback = self._hand_over

    def read(self) -> Loaded:
        """Return what the files hold now; blocks. Raises ConfigError if they cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password=_refuse_password)
            return Loaded(context, Path(self._cert).read_bytes())
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise ConfigError(
                f"tls_cert={self._cert!r}, tls_key={self._key!r}: {why}; both must be PEM files: the "
                "certificate with its chain, and the key that belongs to it, without a password"
            ) from error

    def use(self, loaded: Loaded) -> bool:
        """Use what :meth:`read` has returned for connections from now on; open ones keep what they have.
        Returns whether it is another certificate."""
        before, self._current = self._current, loaded
        return before.content != loaded.content

    def _hand_over(self, connection: ssl.SSLObject, name: str | None, listening: ssl.SSLContext) -> None:
        connection.context = self._current.context


def _refuse_password() -> str:
    """Keep OpenSSL from asking for one on the terminal."""
    raise ValueError("the key is encrypted")
