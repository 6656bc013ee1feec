"""Where a machine's QMP monitor is."""

from postcopy.errors import Refused


def parse(address: str) -> str | tuple[str, int]:
    """What ``qemu.qmp`` connects to: a path, or host and port.

    :param address: ``unix:PATH``, ``tcp:HOST:PORT``, or a path with a slash in it; what QEMU takes
        after a comma (``server=on,wait=off``) changes nothing.
    :raises Refused: not such an address.
    """
    kind, _, place = address.partition(",")[0].partition(":")
    if "/" in kind and not place:
        return kind
    if kind == "unix" and place:
        return place
    host, _, port = place.rpartition(":")
    if kind == "tcp" and ":" in place and port.isdecimal():
        return host.strip("[]") or "127.0.0.1", int(port)
    raise Refused(f"'{address}' is no QMP address; give unix:PATH or tcp:HOST:PORT")
