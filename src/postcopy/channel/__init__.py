"""The way to the peer: bytes in, bytes out; knows no records.

``address`` reads QEMU's URIs, ``connect`` and ``listen`` turn one into a :class:`Channel`, and
``rate_limit`` paces what is sent.
"""

from postcopy.channel.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
    parse,
)
from postcopy.channel.channel import Buffer, Channel
from postcopy.channel.connect import connect
from postcopy.channel.listen import Listener
from postcopy.channel.rate_limit import RateLimiter

__all__ = [
    "Address",
    "Buffer",
    "Channel",
    "ExecAddress",
    "FdAddress",
    "FileAddress",
    "Listener",
    "RateLimiter",
    "TcpAddress",
    "UnixAddress",
    "connect",
    "parse",
]
