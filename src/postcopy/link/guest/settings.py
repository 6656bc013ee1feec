"""Capabilities and parameters: what is set in a guest's process, and what one job began with."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from postcopy.channel.address import Address
from postcopy.channel.descriptor_check import Use
from postcopy.link.guest.preflight import (
    check_postcopy,
    check_sink,
    check_snapshot,
    check_transport,
)
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
            check_postcopy()
        if changed.enabled(Capability.BACKGROUND_SNAPSHOT) and running:
            check_snapshot()
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
            check_snapshot()  # it may have been switched on while the guest stood still
        if found.enabled(snapshot) and not overrides.capabilities.get(snapshot):
            check_sink(address)
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
