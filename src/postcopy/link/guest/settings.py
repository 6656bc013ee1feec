"""Capabilities and parameters: what is set in a guest's process, and what one job began with.

What this host or an address cannot do with them is refused here, before anything moves.
"""

import os
import socket
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from postcopy.channel.address import Address, FdAddress, FileAddress, TcpAddress, UnixAddress
from postcopy.channel.descriptor_check import Use, can_answer, check_descriptor
from postcopy.errors import HostCannot, Refused
from postcopy.kernel.userfaultfd import MISSING_FEATURES, SNAPSHOT_FEATURES, Userfaultfd
from postcopy.parameters import Capabilities, Capability, Overrides, Parameters


@dataclass(frozen=True, slots=True)
class Settings:
    """What is on, and what is set; immutable, so that a job keeps what it began with."""

    capabilities: Capabilities = field(default_factory=Capabilities)
    parameters: Parameters = field(default_factory=Parameters)

    def enabled(self, capability: Capability) -> bool:
        """Whether it is on."""
        return self.capabilities.enabled(capability)

    def switched(
        self,
        changes: Mapping[Capability, bool],
        *,
        awaits: bool = False,
        incoming_started: bool = False,
        running: bool = True,
    ) -> "Settings":
        """The settings with capabilities switched, all of them or none.

        :param awaits: a guest is to come here.
        :param incoming_started: the process listens for it already.
        :param running: the guest runs, and writes to its memory while it is saved.
        :raises Refused: they do not go together.
        :raises HostCannot: this host cannot do it.
        """
        if not changes:
            return self
        changed = self.capabilities.with_changes(changes, incoming_started=incoming_started)
        if changed.enabled(Capability.POSTCOPY_RAM) and awaits:
            _check_postcopy()
        if changed.enabled(Capability.BACKGROUND_SNAPSHOT) and running:
            _check_snapshot()
        return Settings(changed, self.parameters)

    def set(self, changes: Mapping[str, object]) -> "Settings":
        """The settings with parameters set by QEMU's names, all of them or none.

        :raises Refused: there is no such parameter, or no such value.
        """
        return Settings(self.capabilities, self.parameters.with_changes(changes))

    def for_migrate(
        self, overrides: Overrides, address: Address, *, running: bool = True
    ) -> "Settings":
        """What an order to migrate to ``address`` begins with.

        :param running: see :meth:`switched`.
        :raises Refused: as :meth:`switched` and :meth:`set`; or the address cannot do it, or a
            snapshot would go to what may run it, and the order does not say that it is one.
        """
        found = self.switched(overrides.capabilities, running=running).set(overrides.parameters)
        check_transport(address, found.capabilities, Use.SEND)
        snapshot = Capability.BACKGROUND_SNAPSHOT
        if found.enabled(snapshot) and running:
            _check_snapshot()  # it may have been switched on while the guest stood still
        if found.enabled(snapshot) and not overrides.capabilities.get(snapshot):
            _check_sink(address)
        return found

    def for_incoming(self, overrides: Overrides, address: Address) -> "Settings":
        """What an order to listen at ``address`` begins with.

        :raises Refused: as :meth:`switched` and :meth:`set`; or the address cannot do it.
        """
        switched = self.switched(overrides.capabilities, awaits=True)
        check_transport(address, switched.capabilities, Use.RECEIVE)
        return switched.set(overrides.parameters)


class _Owner(Protocol):
    settings: Settings


def change_all(owners: Iterable[_Owner], change: Callable[[Settings], Settings]) -> None:
    """Change the settings of several owners, all of them or none.

    :raises PostcopyError: what ``change`` raises.
    """
    changed = [(owner, change(owner.settings)) for owner in owners]
    for owner, settings in changed:
        owner.settings = settings


def _check_postcopy() -> None:
    """Refuse postcopy on a host that cannot do it, before anything moves."""
    try:
        Userfaultfd.open(MISSING_FEATURES).close()
    except HostCannot as error:
        raise error.because("Postcopy is not supported") from error


def _check_snapshot() -> None:
    """Refuse background snapshots on a host that cannot do them, in QEMU's words."""
    try:
        Userfaultfd.open(SNAPSHOT_FEATURES).close()
    except HostCannot as error:
        raise error.because("Background-snapshot is not supported by host kernel") from error


def _check_sink(address: Address) -> None:
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
