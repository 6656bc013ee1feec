"""What the user of a guest's process has set for its migrations: capabilities and parameters."""

from collections.abc import Mapping
from typing import Any

from postcopy.link.host import check_postcopy, check_snapshot
from postcopy.parameters import Capabilities, Capability, Parameters


class Settings:
    """What is on, and what is set; changed under its owner's lock."""

    def __init__(self) -> None:
        self.capabilities = Capabilities()
        self.parameters = Parameters()

    def enabled(self, capability: Capability) -> bool:
        """Whether it is on."""
        return self.capabilities.enabled(capability)

    def switch(
        self, changes: Mapping[Capability, bool], *, awaits: bool, incoming_started: bool
    ) -> None:
        """Switch capabilities, all of them or none.

        :param awaits: a guest is to come here.
        :param incoming_started: and somewhere is being listened for it.
        :raises Refused: they do not go together.
        :raises HostCannot: this host cannot do it.
        """
        changed = self.capabilities.with_changes(changes, incoming_started=incoming_started)
        if changed.enabled(Capability.POSTCOPY_RAM) and awaits:
            check_postcopy()
        if changed.enabled(Capability.BACKGROUND_SNAPSHOT):
            check_snapshot()
        self.capabilities = changed

    def set(self, changes: Mapping[str, object]) -> None:
        """Set parameters by QEMU's names, all of them or none.

        :raises Refused: there is no such parameter, or no such value.
        """
        self.parameters = self.parameters.with_changes(changes)

    def to_wire(self) -> dict[str, Any]:
        """What an engine is told of them."""
        return {
            "capabilities": list(self.capabilities),
            "parameters": self.parameters.to_qapi(),
        }
