"""A command that carries bytes both ways between its standard input and output and an address.

``exec:`` of it is what ``socat - TCP:…`` or ``ssh host socat …`` are to a user.  A program of its own that
imports as little as it can: ``python -S carry.py tcp:HOST:PORT`` or ``unix:PATH``.
"""

import os
import select
import socket
import sys

CHUNK_BYTES = 1 << 18
_STDIN, _STDOUT = 0, 1


def command(address: str) -> str:
    """The ``exec:`` URI of this program, carrying to an address."""
    return f"exec:exec {sys.executable} -S -E {__file__} {address}"


def connected(address: str) -> socket.socket:
    kind, _, rest = address.partition(":")
    if kind == "unix":
        made = socket.socket(socket.AF_UNIX)
        made.connect(rest)
        return made
    host, _, port = rest.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)))


def carry(far: socket.socket) -> None:
    """Until the far side has ended; the end of the input is passed on."""
    ways = {_STDIN: far.sendall, far.fileno(): write_all}
    poll = select.poll()
    for fd in ways:
        poll.register(fd, select.POLLIN)
    while far.fileno() in ways:
        for fd, _ in poll.poll():
            data = os.read(fd, CHUNK_BYTES)
            if data:
                ways[fd](data)
                continue
            poll.unregister(fd)
            del ways[fd]
            if fd == _STDIN:
                far.shutdown(socket.SHUT_WR)


def write_all(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]


if __name__ == "__main__":
    with connected(sys.argv[1]) as there:
        carry(there)
