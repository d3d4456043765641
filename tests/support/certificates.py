"""A certificate authority, and a certificate of it for the processes on this machine."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM


def ray_tls(folder: Path) -> dict[str, str]:
    """Ray's variables for TLS, with files in ``folder``."""
    authority_key, key = _key(), _key()
    here = socket.gethostname()
    addresses = {"127.0.0.1", *socket.gethostbyname_ex(here)[2], _outward_address()}
    names = [x509.DNSName("localhost"), x509.DNSName(here)]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    authority = x509.BasicConstraints(ca=True, path_length=None)
    files = {
        "CA_CERT": _certificate("authority", authority_key, authority),
        "SERVER_CERT": _certificate(
            "node", key, x509.SubjectAlternativeName(names), issuer="authority", issuer_key=authority_key
        ),
        "SERVER_KEY": _private(key),
    }
    found = {"RAY_USE_TLS": "1"}
    for name, content in files.items():
        file = folder / f"{name.lower()}.pem"
        file.write_bytes(content)
        found[f"RAY_TLS_{name}"] = str(file)
    return found


def self_signed(folder: Path, name: str, until: datetime.datetime | None = None) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, whose subject is ``name``, and its key: two PEM files in ``folder``, which
    replace those of an earlier call. It is valid for a day, or until ``until``."""
    key = _key()
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(_certificate(name, key, here, until=until))
    key_file.write_bytes(_private(key))
    return cert_file, key_file


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    extension: x509.BasicConstraints | x509.SubjectAlternativeName,
    *,
    issuer: str | None = None,
    issuer_key: ec.EllipticCurvePrivateKey | None = None,
    until: datetime.datetime | None = None,
) -> bytes:
    """Signed by its own key, unless there is an issuer."""
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    until = now + day if until is None else until
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (subject, issuer or subject)]
    made = (
        x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
        .not_valid_before(min(now, until) - day)
        .not_valid_after(until)
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .sign(issuer_key or key, hashes.SHA256())
    )
    return made.public_bytes(PEM)


def _outward_address() -> str:
    """The one that other machines see; Ray's processes use it. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
