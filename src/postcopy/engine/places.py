"""Where an order sends an engine, or lets it listen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from postcopy.channel.address import FdAddress, parse
from postcopy.errors import WrongState

if TYPE_CHECKING:
    from postcopy.channel.listen import Listener


def uri_of(uri: str, fds: Sequence[int]) -> str:
    """Where to go; a descriptor that came along has a number of this process.

    :raises WrongState: the address is a descriptor, and none came along: the same number means another
        file here.
    """
    if not fds and isinstance(parse(uri), FdAddress):
        raise WrongState(
            f"what '{uri}' was has gone with the engine process that had it; use another address"
        )
    return f"fd:{fds[0]}" if fds else uri


def described(listener: "Listener") -> list[dict[str, object]]:
    """Where somebody listens, as QAPI has it."""
    addresses = (address.to_qapi() for address in listener.addresses)
    return [address for address in addresses if address is not None]
