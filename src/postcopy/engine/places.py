"""Where an order sends an engine, or lets it listen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from postcopy.channel.listen import Listener


def uri_of(uri: str, fds: Sequence[int]) -> str:
    """Where to go; a descriptor that came along has a number of this process."""
    return f"fd:{fds[0]}" if fds else uri


def described(listener: "Listener") -> list[dict[str, object]]:
    """Where somebody listens, as QAPI has it."""
    addresses = (address.to_qapi() for address in listener.addresses)
    return [address for address in addresses if address is not None]
