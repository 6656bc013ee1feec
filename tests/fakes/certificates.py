"""Folders of certificates, good and bad, as QEMU and postcopy read them."""

from pathlib import Path

from postcopy.channel.certificates import Authority, write_host
from postcopy.tls_options import TlsOptions


class Certificates:
    """One CA with hosts; ``foreign`` is signed by another CA under the same name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.make()
        folder.mkdir(exist_ok=True)

    def host(self, name: str = "localhost", *, days: int = 30) -> Path:
        place = self.folder / f"{name}.{days}"
        write_host(place, self.authority, name, days=days)
        return place

    def foreign(self, name: str = "localhost") -> Path:
        """A host whose own certificates another CA has signed, and which trusts this one."""
        place = self.folder / f"{name}.foreign"
        write_host(place, Authority.make(), name)
        (place / "ca-cert.pem").write_bytes(self.authority.pem)
        return place


def client(folder: Path, **more) -> TlsOptions:
    return TlsOptions(str(folder), is_server=False, **more)


def server(folder: Path, **more) -> TlsOptions:
    return TlsOptions(str(folder), is_server=True, **more)
