"""Where an engine is to go: an address as the guest's process hands it over."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from postcopy.channel.address import Address, FdAddress


@contextmanager
def descriptors(address: Address) -> Iterator[list[int]]:
    """The descriptors to send along with an address: an ``fd:`` means one of this process."""
    fds = [os.dup(address.number)] if isinstance(address, FdAddress) else []
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def bound_uri(uri: str, addresses: Sequence[Mapping[str, Any]]) -> str:
    """Where we can be reached in fact: a port of 0 has become a real one."""
    if addresses and addresses[0].get("type") == "inet":
        return f"tcp:{addresses[0]['host']}:{addresses[0]['port']}"
    return uri
