"""Makes a certificate authority and the certificates of hosts, in the files that QEMU reads.

Each host gets both ends: a source is the TLS client, a destination the server, and a host may be either.
"""

import datetime as dt
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from postcopy.channel.tls_session import CA_CERT, CLIENT_FILES, SERVER_FILES
from postcopy.channel.whole_file import write_whole
from postcopy.errors import Refused

CA_KEY: Final = "ca-key.pem"
DAYS: Final = 365
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,251}[A-Za-z0-9])?")
_SKEW: Final = dt.timedelta(hours=1)
"""How far apart the clocks of two hosts may be."""

_Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its certificate, and the key that signs others."""

    certificate: x509.Certificate
    key: _Key

    @classmethod
    def make(cls, name: str = "postcopy CA", days: int = DAYS) -> "Authority":
        """Make one that is valid for so many days."""
        key = _new_key()
        subject = _named(name)
        unsigned = (
            _begun(subject, subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
        )
        return cls(unsigned.sign(key, hashes.SHA256()), key)

    def issue(self, host: str, *, server: bool, days: int = DAYS) -> tuple[bytes, bytes]:
        """Return the certificate of one end at a host and its key, in PEM.

        :param host: a name or an address.
        :param days: a negative number makes one that has expired.
        """
        key = _new_key()
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        issuer = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        signed = (
            _begun(_named(host), self.certificate.subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(_names_of(host)), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        return signed.public_bytes(serialization.Encoding.PEM), _pem(key)

    @property
    def pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def write_hosts(folder: Path, hosts: Mapping[str, str], *, days: int = DAYS) -> list[Path]:
    """Make an authority in a folder, and in it a folder of certificates for each host; return these.

    :param hosts: the name or address of a host, by the name of its folder.

    The key of the authority stays in ``ca-key.pem`` of ``folder``: no host needs it.

    :raises Refused: the folder is not empty, or a host's name cannot be one.
    :raises OSError: it cannot be written.
    """
    for host in hosts.values():
        if not _NAME.fullmatch(host) or ".." in host:
            raise Refused(f"'{host}' is no host name or address; give one, such as host1.example")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise Refused(f"{folder} is not empty; give another folder, or remove what is in it")
    authority = Authority.make(days=days)
    write_whole(folder / CA_KEY, _pem(authority.key), replacing=False)
    write_whole(folder / CA_CERT, authority.pem, replacing=False)
    made = []
    for name, host in hosts.items():
        place = folder / name
        write_host(place, authority, host, days=days)
        made.append(place)
    return made


def write_host(folder: Path, authority: Authority, host: str, *, days: int = DAYS) -> None:
    """Write the files of one host: those of a source and those of a destination."""
    folder.mkdir(mode=0o700, exist_ok=True)
    write_whole(folder / CA_CERT, authority.pem)
    for names, server in ((SERVER_FILES, True), (CLIENT_FILES, False)):
        for name, data in zip(names, authority.issue(host, server=server, days=days), strict=True):
            write_whole(folder / name, data)


def _new_key() -> _Key:
    return ec.generate_private_key(ec.SECP256R1())


def _pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _names_of(host: str) -> list[x509.GeneralName]:
    """What a source may call the host; ``localhost`` has its addresses, too."""
    if host == "localhost":
        addresses = [ipaddress.ip_address(each) for each in ("127.0.0.1", "::1")]
        return [x509.DNSName(host), *(x509.IPAddress(each) for each in addresses)]
    try:
        return [x509.IPAddress(ipaddress.ip_address(host))]
    except ValueError:
        return [x509.DNSName(host)]


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    end = now + dt.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end - _SKEW) - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    """What a key may do; QEMU refuses the certificate of a host that lacks key encipherment."""
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
