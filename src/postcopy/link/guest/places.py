"""Where an engine is to go: an address as the guest's process hands it over."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from postcopy.channel.address import Address, FdAddress
from postcopy.channel.descriptor_check import Use, check_descriptor
from postcopy.errors import Refused


@contextmanager
def descriptors(address: Address, use: Use) -> Iterator[list[int]]:
    """The descriptors to send along with an address: an ``fd:`` means one of this process.

    :raises Refused: it cannot be used so.
    """
    fds = []
    if isinstance(address, FdAddress):
        check_descriptor(address.number, use)
        fds = [_duplicate(address)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _duplicate(address: FdAddress) -> int:
    try:
        return os.dup(address.number)
    except OSError as failure:
        raise Refused(f"{address} cannot be duplicated: {failure.strerror}") from failure


def bound_uri(uri: str, addresses: Sequence[Mapping[str, Any]]) -> str:
    """Where we can be reached in fact: a port of 0 has become a real one."""
    if addresses and addresses[0].get("type") == "inet":
        return f"tcp:{addresses[0]['host']}:{addresses[0]['port']}"
    return uri
