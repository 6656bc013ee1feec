"""What this host can do for a guest, asked before anything moves."""

import os
import socket
import stat

from postcopy.abi.userfaultfd import Feature
from postcopy.channel.address import (
    Address,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
)
from postcopy.channel.descriptor_check import Use, can_answer, check_descriptor
from postcopy.errors import HostCannot, Refused, WrongState
from postcopy.kernel.userfaultfd import (
    MISSING_FEATURES,
    SNAPSHOT_FEATURES,
    WRITE_FEATURES,
    Userfaultfd,
)
from postcopy.link.guest.keeper import GuestKeeper, OwnedGuest
from postcopy.ownership import Move
from postcopy.parameters import Capabilities, Capability


def check_poison(guest: OwnedGuest) -> None:
    """Refuse what would leave the guest half-way."""
    cure = "set x-on-loss to 'quit', or wait for the source with 'hold'"
    if guest.accelerator_name != "kvm":
        raise HostCannot("a software CPU cannot be stopped at a page that is lost", cure)
    try:
        Userfaultfd.open(Feature.POISON).close()
    except HostCannot as error:
        raise HostCannot(f"pages cannot be poisoned: {error.what}", cure) from error


def check_movable(guest: OwnedGuest, keeper: GuestKeeper) -> None:
    """Refuse to send, or to photograph, what is not here, not whole, or to go back some day.

    :raises WrongState: it is so.
    """
    guest.ownership.check(Move.ORDER)
    if any(keeper.lost.values()):
        raise WrongState("pages of this guest are lost, so it cannot move; start it anew")
    if sharing := guest.shared_with():
        names = ", ".join(process.name for process in sharing)
        raise WrongState(
            f"the guest's memory is shared with {names}, whose writes are not tracked, so it can neither "
            "be sent nor saved, nor have a reset point; detach that first"
        )
    if keeper.reset_point:
        raise WrongState(
            "the guest has a reset point, whose tracking of writes excludes migrations and snapshots; "
            "end it first (x-reset-end, or 'postcopy reset --end')"
        )


def check_postcopy() -> None:
    """Refuse postcopy on a host that cannot do it, before anything moves."""
    try:
        Userfaultfd.open(MISSING_FEATURES).close()
    except HostCannot as error:
        raise error.because("Postcopy is not supported") from error


def check_snapshot() -> None:
    """Refuse background snapshots on a host that cannot do them, in QEMU's words."""
    try:
        Userfaultfd.open(SNAPSHOT_FEATURES).close()
    except HostCannot as error:
        raise error.because("Background-snapshot is not supported by host kernel") from error


def check_reset() -> None:
    """Refuse a reset point on a host that cannot track writes."""
    try:
        Userfaultfd.open(WRITE_FEATURES, user_mode_only=True).close()
    except HostCannot as error:
        raise error.because("the writes of a guest cannot be tracked") from error


def check_sink(address: Address) -> None:
    """Refuse a background snapshot to what may be another machine: its guest would run twice.

    QEMU sends it, and its destination runs the guest.

    :raises Refused: something listens there.
    """
    if isinstance(address, TcpAddress | UnixAddress) or (
        isinstance(address, FdAddress) and _has_named_peer(address.number)
    ):
        raise Refused(
            f"capability background-snapshot is on, so the guest would go on here, and what listens at "
            f"{address} may run it too; switch it off to migrate, or order a snapshot (x-snapshot)"
        )


def _has_named_peer(fd: int) -> bool:
    """Whether a descriptor is a socket whose other end was reached by its name."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as connection:
        try:
            return bool(connection.getpeername())
        except OSError:
            return False  # its peer has gone


def check_transport(address: Address, capabilities: Capabilities, use: Use) -> None:
    """Refuse an address that cannot do what the capabilities need.

    Two connections come where it can be reached more than once; pages have places in a file only; and
    what answers is a socket or a command.  See ``docs/transports.md``.

    :raises Refused: in QEMU's words, where QEMU does not find it out half-way.
    """
    if capabilities.enabled(Capability.MAPPED_RAM) and not isinstance(address, FileAddress):
        raise Refused("Migration requires seekable transport (e.g. file)")
    if capabilities.enabled(Capability.POSTCOPY_PREEMPT) and not isinstance(
        address, TcpAddress | UnixAddress
    ):
        raise Refused("Migration requires multi-channel URIs (e.g. tcp)")
    if isinstance(address, FdAddress):
        check_descriptor(address.number, use)
    if use is Use.SEND:
        _check_answers(address, capabilities)


def _check_answers(address: Address, capabilities: Capabilities) -> None:
    if isinstance(address, FdAddress):
        answers = can_answer(address.number)
    else:
        answers = not isinstance(address, FileAddress)
    if answers:
        return
    if capabilities.enabled(Capability.POSTCOPY_RAM):
        raise Refused(f"postcopy needs a channel that answers, which {address} does not")
    if capabilities.enabled(Capability.RETURN_PATH):
        raise Refused(
            f"return-path needs a channel that answers, which {address} does not; switch it off"
        )
