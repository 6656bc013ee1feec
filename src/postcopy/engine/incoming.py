"""An engine's orders about a guest that arrives."""

from collections.abc import Sequence

from postcopy.channel.address import parse
from postcopy.channel.descriptor_check import received_uri
from postcopy.channel.listen import Listener
from postcopy.destination.destination import Destination
from postcopy.destination.incoming_ram import Populating, memory_to_spare_bytes
from postcopy.engine.context import EngineContext
from postcopy.errors import WrongState
from postcopy.link.protocol import Addresses, IncomingCommands
from postcopy.link.values import Fd
from postcopy.machine.device_formats import FORMATS
from postcopy.parameters import Capabilities, Parameters
from postcopy.status import Status

_LOOK_S = 0.05


class Incoming(IncomingCommands):
    """Runs one destination; see :class:`IncomingCommands` for what each order does."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context

    def prepare_destination(self) -> None:
        ram = self._context.take_ram()
        populating = Populating(self._context.guest(), ram, memory_to_spare_bytes())
        self._context.populating = populating
        populating.start()

    def listen(
        self, uri: str, capabilities: Capabilities, parameters: Parameters, fds: Sequence[Fd] = ()
    ) -> Addresses:
        listener = Listener(parse(received_uri(uri, fds)))
        if self._context.populating is None:
            self.prepare_destination()
        return self._make(listener, capabilities, parameters)

    def _make(
        self, listener: Listener, capabilities: Capabilities, parameters: Parameters
    ) -> Addresses:
        context = self._context
        assert context.populating is not None
        destination = Destination(
            context.guest(),
            FORMATS,
            listener,
            context.take_ram(),
            context.populating,
            capabilities,
            context.progress,
            parameters,
        )
        context.set_job(destination)
        context.take_capabilities = destination.set_capabilities
        context.take_space = destination.share
        context.on_exit = destination.stop_waiting  # a Unix socket's file would stay
        context.end_commands = destination.leave
        return listener.described()

    def accept(self) -> None:
        self._context.start("destination", self._destination.run)

    def recover_destination(self, uri: str, fds: Sequence[Fd] = ()) -> Addresses:
        address = parse(received_uri(uri, fds))
        self._context.check_paused()
        self._destination.stop_waiting()
        while not self._context.join(_LOOK_S):
            self._context.check_paused()  # the source may have come back that very moment
        listener = Listener(address)
        self._recover_at(listener)
        return listener.described()

    def _recover_at(self, listener: Listener) -> None:
        self._destination.begin_recovery(listener)
        self._context.start("destination", self._destination.recover)

    def adopt_destination(
        self, uri: str, capabilities: Capabilities, parameters: Parameters, fds: Sequence[Fd] = ()
    ) -> Addresses:
        self._context.take_over(Status.POSTCOPY_PAUSED)
        self._context.populating = Populating(self._context.guest(), self._context.take_ram(), 0)
        listener = Listener(parse(received_uri(uri, fds)))
        addresses = self._make(listener, capabilities, parameters)
        self._destination.adopt()
        self._recover_at(listener)
        return addresses

    @property
    def _destination(self) -> Destination:
        if not isinstance(self._context.job, Destination):
            raise WrongState("this engine runs no incoming migration")
        return self._context.job
