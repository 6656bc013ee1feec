"""Takes orders over the link and runs one source or one destination."""

import os
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postcopy.channel.address import parse
from postcopy.channel.listen import Listener
from postcopy.destination.destination import Destination
from postcopy.destination.incoming_ram import Populating, memory_to_spare_bytes
from postcopy.errors import WrongState
from postcopy.guest import DeviceState
from postcopy.link.guest_proxy import GuestProxy
from postcopy.link.rpc import Handler, Link
from postcopy.machine import sections
from postcopy.machine.device_formats import FORMATS
from postcopy.paging.ram import PagedRam
from postcopy.parameters import Capabilities, Parameters
from postcopy.source.source import Source, Wishes
from postcopy.status import Progress, Status
from postcopy.stream.description import build_description
from postcopy.stream.records import Configuration


class EngineService:
    """One engine, for one guest and one migration."""

    def __init__(self, connection: socket.socket) -> None:
        self._ended = threading.Event()
        self._link = Link(connection, self._handlers(), on_end=self._ended.set, name="guest-link")
        self._guest: GuestProxy | None = None
        self._job: Source | Destination | None = None
        self._ram: PagedRam | None = None
        self._populating: Populating | None = None
        self._progress = Progress(self._report, Status.SETUP)

    def run(self) -> None:
        """Serve until the guest's process closes the link; then this process ends."""
        self._link.start()
        self._ended.wait()
        # Threads may wait in calls that nothing will end; all that matters outlives us elsewhere.
        os._exit(0)

    def _handlers(self) -> dict[str, Handler]:
        return {
            "prepare_destination": self._prepare_destination,
            "listen": self._listen,
            "accept": self._accept,
            "start_source": self._start_source,
            "set_capabilities": self._set_capabilities,
            "set_parameters": self._set_parameters,
            "start_postcopy": self._start_postcopy,
            "proceed": self._proceed,
            "cancel": self._cancel,
            "pause": self._pause,
            "info": self._info,
        }

    # --- the source

    def _start_source(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],
        fds: Sequence[int] = (),
    ) -> None:
        wishes = Wishes(f"fd:{fds[0]}" if fds else uri, Capabilities.of(capabilities))
        self._job = source = Source(
            self._proxy(),
            wishes,
            Parameters().with_changes(parameters),
            self._progress,
            self._describe_devices,
            lambda number: self._link.note("passed", number=number),
        )
        _start("source", source.run)

    def _describe_devices(self, states: Sequence[DeviceState]) -> str:
        configuration = Configuration(self._proxy().machine_name)
        return build_description(configuration, sections.descriptions(states))

    @property
    def _source(self) -> Source:
        if not isinstance(self._job, Source):
            raise WrongState("this engine runs no outgoing migration")
        return self._job

    def _start_postcopy(self) -> None:
        self._source.orders.postcopy()

    def _proceed(self) -> None:
        self._source.orders.proceed()

    def _cancel(self) -> None:
        self._source.cancel()

    def _set_parameters(self, parameters: Mapping[str, Any]) -> None:
        if isinstance(self._job, Source):
            self._job.set_parameters(Parameters().with_changes(parameters))

    # --- the destination

    def _prepare_destination(self) -> None:
        guest = self._proxy()
        self._ram = PagedRam(guest.regions(), guest.page_maps())
        self._populating = Populating(self._ram, memory_to_spare_bytes())
        self._populating.start()

    def _listen(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],  # noqa: ARG002 - none matters to a destination yet
        fds: Sequence[int] = (),
    ) -> list[dict[str, object]]:
        listener = Listener(parse(f"fd:{fds[0]}" if fds else uri))
        if self._ram is None:
            self._prepare_destination()
        assert self._ram is not None
        assert self._populating is not None
        self._job = Destination(
            self._proxy(),
            FORMATS,
            listener,
            self._ram,
            self._populating,
            Capabilities.of(capabilities),
            self._progress,
        )
        described = (address.to_qapi() for address in listener.addresses)
        return [address for address in described if address is not None]

    def _accept(self) -> None:
        assert isinstance(self._job, Destination)
        _start("destination", self._job.run)

    def _set_capabilities(self, capabilities: Sequence[str]) -> None:
        if isinstance(self._job, Destination):
            self._job.set_capabilities(Capabilities.of(capabilities))

    # --- both

    def _pause(self) -> None:
        if self._job is not None:
            self._job.pause()

    def _info(self) -> dict[str, Any]:
        if self._job is None:
            raise WrongState("this engine has nothing to do yet")
        return self._job.info().to_wire()

    def _proxy(self) -> GuestProxy:
        if self._guest is None:
            self._guest = GuestProxy(self._link)
        return self._guest

    def _report(self, status: Status) -> None:
        """Tell the guest's process; called with each change, in order."""
        assert self._job is not None
        error = self._job.error
        self._link.note(
            "status",
            status=status.value,
            error=str(error) if error is not None else None,
            info=self._job.info().to_wire(),
        )


def _start(name: str, run: Callable[[], None]) -> None:
    threading.Thread(target=_guarded, args=(run,), name=name, daemon=True).start()


def _guarded(run: Callable[[], None]) -> None:
    """Run a job; a fault of ours ends the process, and the guest's process decides what it means."""
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
