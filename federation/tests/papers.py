"""Certificates and keys as a federation needs them, made for one test."""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM
NOBODY = serialization.NoEncryption()


def authority(folder):
    """Write ca.crt, and the server.crt and server.key that it has signed for this machine."""
    folder.mkdir(parents=True)
    ca, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rehearsal")])
    own = sign(name, name, ca.public_key(), ca, x509.BasicConstraints(True, None))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    link = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    signed = sign(link, name, server.public_key(), ca, here)
    (folder / "ca.crt").write_bytes(own.public_bytes(PEM))
    (folder / "server.crt").write_bytes(signed.public_bytes(PEM))
    form = serialization.PrivateFormat.PKCS8
    (folder / "server.key").write_bytes(server.private_bytes(PEM, form, NOBODY))


def sign(subject, issuer, public, key, extension):
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    made = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
    made = made.not_valid_before(now - day).not_valid_after(now + day)
    made = made.add_extension(extension, True)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return made.add_extension(above, False).sign(key, hashes.SHA256())


def keys(path):
    """Write a SuperNode's private key, and its public one beside it."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(PEM, form, NOBODY))
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".pub").write_bytes(public)
