"""What a migration needs to know of TLS: credentials, whom they are checked against, and who may come.

The names are QEMU's: objects of the kinds ``tls-creds-x509``, ``authz-simple`` and ``authz-list``
(``qapi/crypto.json``, ``qapi/authz.json``), and the parameters ``tls-creds``, ``tls-hostname`` and
``tls-authz``.  A key never stands here: only the folder where its file is.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class AuthorizationRule:
    """One rule of ``authz-list``.

    :ivar match: a distinguished name, such as ``CN=host,O=Example``.
    :ivar allow: what it decides about a name that matches.
    :ivar glob: ``*`` and ``?`` in ``match`` stand for any characters.
    """

    match: str
    allow: bool
    glob: bool = False

    def fits(self, name: str) -> bool:
        """Whether it is about this distinguished name."""
        return fnmatchcase(name, self.match) if self.glob else name == self.match


@dataclass(frozen=True, slots=True)
class Authorization:
    """Which sources may connect: the first rule that fits decides, and ``allow`` where none does."""

    rules: tuple[AuthorizationRule, ...]
    allow: bool = False

    def allows(self, name: str) -> bool:
        """Whether the holder of a certificate may connect.

        :param name: the distinguished name in it, as RFC 4514 writes it.
        """
        return next((rule.allow for rule in self.rules if rule.fits(name)), self.allow)


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """TLS of one migration: each of its connections is encrypted by itself.

    :ivar directory: absolute path of the folder with QEMU's files (``ca-cert.pem`` and so on).
    :ivar is_server: of a destination; a source is the client.
    :ivar verify_peer: refuse a peer whose certificate the CA has not signed.
    :ivar priority: which versions of TLS, as GnuTLS writes it; empty: all that are safe.
    :ivar hostname: the name that the destination's certificate must have; empty: that of the address.
    :ivar authorization: which sources may connect; None: all with a certificate of the CA.
    """

    directory: str
    is_server: bool
    verify_peer: bool = True
    priority: str = ""
    hostname: str = ""
    authorization: Authorization | None = None
