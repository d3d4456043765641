"""TLS with a certificate that can be renewed while connections are open."""

from __future__ import annotations

import math
import re
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from aioengine.errors import ConfigError

_VALIDITY = re.compile(rb"\x30.[\x17\x18].\d+Z(?:\x17\x0d(\d{12}Z)|\x18\x0f(\d{14}Z))", re.DOTALL)
"""Of an X.509 certificate in DER: the two times of its validity (RFC 5280, section 4.1.2.5)."""


class Loaded(NamedTuple):
    """A certificate as its files held it."""

    context: ssl.SSLContext
    content: bytes
    """The certificate's file, to tell a new one from the old."""
    expires: float
    """Unix time."""


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

    @property
    def expires(self) -> float:
        """Unix time at which the certificate in use expires."""
        return self._current.expires

    def renewed(self) -> Loaded:
        """Return what the files hold now; blocks. Raises ConfigError if they cannot be used, or hold a
        certificate that has expired."""
        found = self.read()
        if found.expires < time.time():
            raise ConfigError(f"tls_cert={self._cert!r}: {expiry(found.expires)}")
        return found

    def read(self) -> Loaded:
        """Return what the files hold now, even if it has expired; blocks. Raises ConfigError if they cannot
        be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION  # each costs the server as much as a handshake
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password=_refuse_password)
            content = Path(self._cert).read_bytes()
            return Loaded(context, content, _expires(content.decode("ascii", "replace")))
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


def expiry(expires: float) -> str:
    """Say when a certificate expires, or that it has."""
    how = "has expired" if expires < time.time() else "expires"
    return f"the TLS certificate {how} at {datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M} UTC"


def _expires(pem: str) -> float:
    """Return when the first certificate of a PEM file expires; infinity if that cannot be read."""
    begin, end = pem.find(ssl.PEM_HEADER), pem.find(ssl.PEM_FOOTER)
    if begin < 0:  # one of the other headers that OpenSSL knows
        return math.inf
    found = _VALIDITY.search(ssl.PEM_cert_to_DER_cert(pem[begin : end + len(ssl.PEM_FOOTER)]))
    if found is None:
        return math.inf
    text = (found[1] or found[2]).decode()
    form = "%y%m%d%H%M%SZ" if found[1] else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()


def _refuse_password() -> str:
    """Keep OpenSSL from asking for one on the terminal."""
    raise ValueError("the key is encrypted")
