"""An engine's orders about a guest that arrives."""

from collections.abc import Mapping, Sequence
from typing import Any

from postcopy.channel.address import parse
from postcopy.channel.listen import Listener
from postcopy.destination.destination import Destination
from postcopy.destination.incoming_ram import Populating, memory_to_spare_bytes
from postcopy.engine.desk import Desk
from postcopy.engine.places import described, uri_of
from postcopy.errors import WrongState
from postcopy.machine.device_formats import FORMATS
from postcopy.parameters import Capabilities, Parameters
from postcopy.status import Status

_LOOK_S = 0.05


class Incoming:
    """Runs one destination."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def prepare_destination(self) -> None:
        """Have memory ready before anybody sends."""
        ram = self._desk.take_ram()
        populating = Populating(self._desk.guest(), ram, memory_to_spare_bytes())
        self._desk.populating = populating
        populating.start()

    def listen(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],
        fds: Sequence[int] = (),
    ) -> list[dict[str, object]]:
        """Wait for a source; return where."""
        listener = Listener(parse(uri_of(uri, fds)))
        if self._desk.populating is None:
            self.prepare_destination()
        return self._make(listener, capabilities, parameters)

    def _make(
        self, listener: Listener, capabilities: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[dict[str, object]]:
        desk = self._desk
        assert desk.populating is not None
        destination = Destination(
            desk.guest(),
            FORMATS,
            listener,
            desk.take_ram(),
            desk.populating,
            Capabilities.of(capabilities),
            desk.progress,
            Parameters().with_changes(parameters),
        )
        desk.take_on(destination)
        desk.take_capabilities = destination.set_capabilities
        desk.leave = destination.stop_waiting  # a Unix socket's file would stay
        desk.end_commands = destination.leave
        return described(listener)

    def accept(self) -> None:
        """Take the source that comes."""
        self._desk.start("destination", self._destination.run)

    def recover_destination(self, uri: str, fds: Sequence[int] = ()) -> list[dict[str, object]]:
        """Listen anew for the source of a paused postcopy."""
        address = parse(uri_of(uri, fds))
        self._desk.check_paused()
        self._destination.stop_waiting()
        while not self._desk.join(_LOOK_S):
            self._desk.check_paused()  # the source may have come back that very moment
        listener = Listener(address)
        self._recover_at(listener)
        return described(listener)

    def _recover_at(self, listener: Listener) -> None:
        self._destination.begin_recovery(listener)
        self._desk.start("destination", self._destination.recover)

    def adopt_destination(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],
        fds: Sequence[int] = (),
    ) -> list[dict[str, object]]:
        """Stand in for an engine that has died while the guest ran; wait where it was reached."""
        self._desk.stand_in(Status.POSTCOPY_PAUSED)
        self._desk.populating = Populating(self._desk.guest(), self._desk.take_ram(), 0)
        listener = Listener(parse(uri_of(uri, fds)))
        addresses = self._make(listener, capabilities, parameters)
        self._destination.adopt()
        self._recover_at(listener)
        return addresses

    @property
    def _destination(self) -> Destination:
        if not isinstance(self._desk.job, Destination):
            raise WrongState("this engine runs no incoming migration")
        return self._desk.job
