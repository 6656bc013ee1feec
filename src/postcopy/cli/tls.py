"""``postcopy tls init``, and the options about TLS that other commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from postcopy.cli.process import notice

if TYPE_CHECKING:
    from postcopy.cli.run_settings import RunSettings
    from postcopy.link.guest.control import MigrationControl
    from postcopy.tls_options import TlsOptions

_DAYS: Final = 365
_NAMES: Final = {"server": "tls-server", "client": "tls-client"}
"""Of the objects that ``--tls`` makes, by their endpoint."""


@click.group(short_help="Make certificates for encrypted migrations.")
def tls() -> None:
    """Make the certificates of hosts that migrate guests to each other."""


@tls.command(short_help="Make a certificate authority and certificates of hosts.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("hosts", metavar="[HOST]...", nargs=-1)
@click.option(
    "--days", type=click.IntRange(1, 36500), default=_DAYS, show_default=True, help="Validity."
)
def init(folder: Path, hosts: tuple[str, ...], days: int) -> None:
    """Make a certificate authority in DIR, and in it a folder with certificates for each HOST.

    HOST is a name or address by which others reach the host; the default is localhost, twice: as
    'source' and 'destination'.  Copy each folder to its host, and give it there as --tls DIR, or to a
    QEMU as tls-creds-x509,dir=DIR.  Keep ca-key.pem to yourself: it makes more of them.
    """
    from postcopy.channel.certificates import write_hosts

    names = {host: host for host in hosts}
    made = write_hosts(
        folder, names or {"source": "localhost", "destination": "localhost"}, days=days
    )
    for place in made:
        click.echo(f"{place}")


def options_of(folder: str | None, *, server: bool, hostname: str | None) -> "TlsOptions | None":
    """What ``--tls DIR`` and ``--tls-hostname`` mean for a command that opens the connections itself.

    :raises Refused: a file is missing or wrong.
    """
    if folder is None:
        return None
    from postcopy.channel.tls_session import context_for
    from postcopy.tls_options import TlsOptions

    found = TlsOptions(str(Path(folder).absolute()), is_server=server, hostname=hostname or "")
    context_for(found)
    return found


def set_up(control: "MigrationControl", settings: "RunSettings") -> None:
    """Make the objects of the command line, and use those of ``--tls``.

    :raises Refused: one of them cannot be made.
    """
    for text in settings.objects:
        from postcopy.monitor.objects import OBJECT, parse_object

        made: dict[str, Any] = OBJECT(parse_object(text), "")
        control.objects.add(made.pop("qom-type"), made.pop("id"), made)
    if settings.tls is not None:
        for endpoint, name in _NAMES.items():
            arguments = {"dir": settings.tls, "endpoint": endpoint}
            control.objects.add("tls-creds-x509", name, arguments)
        used = _NAMES["client" if settings.incoming is None else "server"]
        control.set_parameters({"tls-creds": used})
    elif settings.incoming is not None and _is_open_to_others(settings.incoming):
        notice(
            f"{settings.incoming}: other hosts can connect, and nothing is encrypted; give --tls DIR "
            "('postcopy tls init DIR' makes one)"
        )


def _is_open_to_others(uri: str) -> bool:
    """Whether a listener there can be reached from other hosts."""
    from ipaddress import ip_address

    from postcopy.channel.address import TcpAddress, parse
    from postcopy.cli.run_settings import DEFER

    if uri == DEFER or not isinstance(address := parse(uri), TcpAddress):
        return False
    try:
        return not ip_address(address.host).is_loopback
    except ValueError:
        return address.host != "localhost"
