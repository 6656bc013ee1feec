"""An engine's orders about a guest that arrives."""

from collections.abc import Mapping, Sequence
from typing import Any

from postcopy.channel.address import parse
from postcopy.channel.listen import Listener
from postcopy.destination.destination import Destination
from postcopy.destination.incoming_ram import Populating, memory_to_spare_bytes
from postcopy.engine.context import EngineContext
from postcopy.engine.places import described, uri_of
from postcopy.errors import WrongState
from postcopy.machine.device_formats import FORMATS
from postcopy.parameters import Capabilities, Parameters
from postcopy.status import Status

_LOOK_S = 0.05


class Incoming:
    """Runs one destination."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context

    def prepare_destination(self) -> None:
        """Have memory ready before anybody sends."""
        ram = self._context.take_ram()
        populating = Populating(self._context.guest(), ram, memory_to_spare_bytes())
        self._context.populating = populating
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
        if self._context.populating is None:
            self.prepare_destination()
        return self._make(listener, capabilities, parameters)

    def _make(
        self, listener: Listener, capabilities: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[dict[str, object]]:
        context = self._context
        assert context.populating is not None
        destination = Destination(
            context.guest(),
            FORMATS,
            listener,
            context.take_ram(),
            context.populating,
            Capabilities.of(capabilities),
            context.progress,
            Parameters().with_changes(parameters),
        )
        context.set_job(destination)
        context.take_capabilities = destination.set_capabilities
        context.on_exit = destination.stop_waiting  # a Unix socket's file would stay
        context.end_commands = destination.leave
        return described(listener)

    def accept(self) -> None:
        """Take the source that comes."""
        self._context.start("destination", self._destination.run)

    def recover_destination(self, uri: str, fds: Sequence[int] = ()) -> list[dict[str, object]]:
        """Listen anew for the source of a paused postcopy."""
        address = parse(uri_of(uri, fds))
        self._context.check_paused()
        self._destination.stop_waiting()
        while not self._context.join(_LOOK_S):
            self._context.check_paused()  # the source may have come back that very moment
        listener = Listener(address)
        self._recover_at(listener)
        return described(listener)

    def _recover_at(self, listener: Listener) -> None:
        self._destination.begin_recovery(listener)
        self._context.start("destination", self._destination.recover)

    def adopt_destination(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],
        fds: Sequence[int] = (),
    ) -> list[dict[str, object]]:
        """Stand in for an engine that has died while the guest ran; wait where it was reached."""
        self._context.take_over(Status.POSTCOPY_PAUSED)
        self._context.populating = Populating(self._context.guest(), self._context.take_ram(), 0)
        listener = Listener(parse(uri_of(uri, fds)))
        addresses = self._make(listener, capabilities, parameters)
        self._destination.adopt()
        self._recover_at(listener)
        return addresses

    @property
    def _destination(self) -> Destination:
        if not isinstance(self._context.job, Destination):
            raise WrongState("this engine runs no incoming migration")
        return self._context.job
