"""An engine's orders about a guest that arrives."""

from collections.abc import Sequence

from postcopy.channel.address import Address, parse
from postcopy.channel.descriptor_check import received_uri
from postcopy.channel.listen import Listener
from postcopy.destination.destination import Destination
from postcopy.destination.incoming_ram import Populating, memory_to_spare_bytes
from postcopy.engine.engine import Engine
from postcopy.errors import WrongState
from postcopy.link.protocol import Addresses, IncomingCommands
from postcopy.link.values import Fd
from postcopy.machine.device_formats import FORMATS
from postcopy.parameters import Settings
from postcopy.status import Status
from postcopy.tls_options import TlsOptions

_LOOK_S = 0.05


class Incoming(IncomingCommands):
    """Runs one destination; see :class:`IncomingCommands` for what each order does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tls: TlsOptions | None = None

    def prepare_destination(self) -> None:
        ram = self._engine.take_ram()
        populating = Populating(self._engine.guest(), ram, memory_to_spare_bytes())
        self._engine.populating = populating
        populating.start()

    def listen(self, uri: str, settings: Settings, fds: Sequence[Fd] = ()) -> Addresses:
        self._tls = settings.tls
        listener = self._listener(parse(received_uri(uri, fds)))
        if self._engine.populating is None:
            self.prepare_destination()
        return self._make(listener, settings)

    def _listener(self, address: Address) -> Listener:
        if self._tls is None:
            return Listener(address)
        from postcopy.channel.tls_listener import TlsListener  # `ssl` takes long to import

        return TlsListener(address, self._tls)

    def _make(self, listener: Listener, settings: Settings) -> Addresses:
        engine = self._engine
        assert engine.populating is not None
        destination = Destination(
            engine.guest(),
            FORMATS,
            listener,
            engine.take_ram(),
            engine.populating,
            settings.capabilities,
            engine.progress,
            settings.parameters,
        )
        engine.set_job(destination)
        engine.take_capabilities = destination.set_capabilities
        engine.take_space = destination.share
        engine.on_exit = destination.stop_waiting  # a Unix socket's file would stay
        engine.end_commands = destination.leave
        return listener.described()

    def accept(self) -> None:
        self._engine.start("destination", self._destination.run)

    def recover_destination(self, uri: str, fds: Sequence[Fd] = ()) -> Addresses:
        address = parse(received_uri(uri, fds))
        self._engine.check_paused()
        self._destination.stop_waiting()
        while not self._engine.join(_LOOK_S):
            self._engine.check_paused()  # the source may have come back that very moment
        listener = self._listener(address)
        self._recover_at(listener)
        return listener.described()

    def _recover_at(self, listener: Listener) -> None:
        self._destination.begin_recovery(listener)
        self._engine.start("destination", self._destination.recover)

    def adopt_destination(self, uri: str, settings: Settings, fds: Sequence[Fd] = ()) -> Addresses:
        self._engine.take_over(Status.POSTCOPY_PAUSED)
        self._engine.populating = Populating(self._engine.guest(), self._engine.take_ram(), 0)
        self._tls = settings.tls
        listener = self._listener(parse(received_uri(uri, fds)))
        addresses = self._make(listener, settings)
        self._destination.adopt()
        self._recover_at(listener)
        return addresses

    @property
    def _destination(self) -> Destination:
        if not isinstance(self._engine.job, Destination):
            raise WrongState("this engine runs no incoming migration")
        return self._engine.job
