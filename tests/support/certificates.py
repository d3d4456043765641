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


def ray_tls(folder: Path) -> dict[str, str]:
    """Ray's variables for TLS, with files in ``folder``."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _name("authority")
    root = (
        _certificate(authority, authority, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    here = socket.gethostname()
    addresses = {"127.0.0.1", *socket.gethostbyname_ex(here)[2], _outward_address()}
    names = [x509.DNSName("localhost"), x509.DNSName(here)]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    node = (
        _certificate(_name("node"), authority, key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files = {"CA_CERT": root.public_bytes(pem), "SERVER_CERT": node.public_bytes(pem), "SERVER_KEY": private}
    found = {"RAY_USE_TLS": "1"}
    for name, content in files.items():
        file = folder / f"{name.lower()}.pem"
        file.write_bytes(content)
        found[f"RAY_TLS_{name}"] = str(file)
    return found


def self_signed(folder: Path, name: str, until: datetime.datetime | None = None) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, whose subject is ``name``, and its key: two PEM files in ``folder``, which
    replace those of an earlier call. It is valid for a day, or until ``until``."""
    key = ec.generate_private_key(ec.SECP256R1())
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        _certificate(_name(name), _name(name), key, until)
        .add_extension(here, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(pem))
    key_file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    until: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=1) if until is None else until
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, until) - datetime.timedelta(days=1))
        .not_valid_after(until)
    )


def _outward_address() -> str:
    """The one that other machines see; Ray's processes use it. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
