"""Where a machine's QMP monitor is."""

from postcopy.channel.address import UnixAddress, parse_socket


def parse(address: str) -> str | tuple[str, int]:
    """What ``qemu.qmp`` connects to: a path, or host and port.

    :param address: ``unix:PATH``, ``tcp:HOST:PORT``, or a path with a slash in it; what QEMU takes
        after a comma (``server=on,wait=off``) changes nothing.
    :raises Refused: not such an address.
    """
    place = address.partition(",")[0]
    is_path = "/" in place.partition(":")[0]
    found = parse_socket(f"unix:{place}" if is_path else place, "QMP")
    if isinstance(found, UnixAddress):
        return found.path
    return found.host or "127.0.0.1", found.port
