"""Takes orders over the link and runs one source, snapshot, destination, restore or reset point."""

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
from postcopy.engine.resets import Resets
from postcopy.errors import WrongState
from postcopy.guest import DeviceState
from postcopy.link.guest_proxy import GuestProxy
from postcopy.link.rpc import Handler, Link
from postcopy.machine import sections
from postcopy.machine.device_formats import FORMATS
from postcopy.paging.ram import PagedRam
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.snapshot.background import BackgroundSnapshot
from postcopy.snapshot.restore import Restore
from postcopy.snapshot.wishes import Wishes as RestoreWishes
from postcopy.source.opening import configuration
from postcopy.source.source import Source, Wishes
from postcopy.status import Progress, Status
from postcopy.stream.description import build_description

_LOOK_S = 0.05
_LAST_WORDS_S = 2.0
"""How long a destination that has completed stays for its source to read so: a process that ends with
unread bytes in a socket resets the connection, and takes its own last word with it."""


class EngineService:
    """One engine, for one guest and one migration."""

    def __init__(self, connection: socket.socket) -> None:
        self._ended = threading.Event()
        self._link = Link(connection, self._handlers(), on_end=self._ended.set, name="guest-link")
        self._guest: GuestProxy | None = None
        self._job: Source | BackgroundSnapshot | Destination | Restore | None = None
        self._ram: PagedRam | None = None
        self._populating: Populating | None = None
        self._progress = Progress(self._report, Status.SETUP)
        self._resume_at = ""
        self._starting = threading.Lock()
        # Under the lock: the job's thread, which has been started.
        self._thread: threading.Thread | None = None
        self._cancelled = False  # which may be said before there is anything to cancel

    def run(self) -> None:
        """Serve until the guest's process closes the link; then this process ends."""
        self._link.start()
        self._ended.wait()
        if isinstance(self._job, Destination):
            self._job.stop_waiting()  # a Unix socket's file would stay
        elif isinstance(self._job, BackgroundSnapshot):
            self._job.leave()
        if self._progress.status is Status.COMPLETED:
            self._join(_LAST_WORDS_S)
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
            "resume_source": self._resume_source,
            "go_on": self._go_on,
            "adopt_source": self._adopt_source,
            "recover_destination": self._recover_destination,
            "adopt_destination": self._adopt_destination,
            "start_restore": self._start_restore,
            "restore": self._begin_restore,
            "adopt_restore": self._adopt_restore,
            "hurry": self._hurry,
            "info": self._info,
            **Resets(self._proxy).handlers(),
        }

    # --- the source

    def _start_source(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],
        fds: Sequence[int] = (),
    ) -> None:
        if Capability.BACKGROUND_SNAPSHOT in Capabilities.of(capabilities).on:
            snapshot = self._make_snapshot(_uri(uri, fds), capabilities, parameters)
            self._job = snapshot
            run = snapshot.run
        else:
            self._make_source(_uri(uri, fds), capabilities, parameters)
            run = self._source.run
        if self._cancelled:
            self._cancel()
        self._start("source", run)

    def _make_snapshot(
        self, uri: str, capabilities: Sequence[str], parameters: Mapping[str, Any]
    ) -> BackgroundSnapshot:
        return BackgroundSnapshot(
            self._proxy(),
            uri,
            Capabilities.of(capabilities),
            Parameters().with_changes(parameters),
            self._progress,
            self._describing(capabilities),
        )

    def _make_source(
        self, uri: str, capabilities: Sequence[str], parameters: Mapping[str, Any]
    ) -> None:
        self._job = Source(
            self._proxy(),
            Wishes(uri, Capabilities.of(capabilities)),
            Parameters().with_changes(parameters),
            self._progress,
            self._describing(capabilities),
            lambda number: self._link.note("passed", number=number),
        )

    def _resume_source(self, uri: str, fds: Sequence[int] = ()) -> None:
        """Leave ``postcopy-paused``.  Nothing is said to anybody yet: whoever asked is answered first."""
        self._check_paused()
        self._join()
        self._source.begin_recovery()
        self._resume_at = _uri(uri, fds)

    def _go_on(self) -> None:
        self._start("source", lambda: self._source.recover(self._resume_at))

    def _adopt_source(self, capabilities: Sequence[str], parameters: Mapping[str, Any]) -> None:
        """Stand in for an engine that has died after switchover."""
        self._progress = Progress(self._report, Status.POSTCOPY_PAUSED)
        self._make_source("", capabilities, parameters)
        self._source.adopt()

    def _describing(self, capabilities: Sequence[str]) -> Callable[[Sequence[DeviceState]], str]:
        """What writes the description of a stream, once there are devices to describe."""
        begin = configuration(self._proxy().machine_name, Capabilities.of(capabilities))
        return lambda states: build_description(begin, sections.descriptions(states))

    @property
    def _source(self) -> Source:
        if not isinstance(self._job, Source):
            raise WrongState("this engine runs no outgoing migration")
        return self._job

    # Orders come as notes, at any time: to whom they mean nothing they must not do harm.

    def _start_postcopy(self) -> None:
        if isinstance(self._job, Source):
            self._job.orders.postcopy()

    def _proceed(self) -> None:
        if isinstance(self._job, Source):
            self._job.orders.proceed()

    def _cancel(self) -> None:
        self._cancelled = True
        if isinstance(self._job, Source | BackgroundSnapshot):
            self._job.cancel()

    def _set_parameters(self, parameters: Mapping[str, Any]) -> None:
        if self._job is not None:
            self._job.set_parameters(Parameters().with_changes(parameters))

    # --- the destination

    def _prepare_destination(self) -> None:
        guest = self._proxy()
        self._ram = PagedRam(guest.regions(), guest.page_maps())
        self._populating = Populating(guest, self._ram, memory_to_spare_bytes())
        self._populating.start()

    def _listen(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],
        fds: Sequence[int] = (),
    ) -> list[dict[str, object]]:
        listener = Listener(parse(_uri(uri, fds)))
        if self._ram is None:
            self._prepare_destination()
        return self._make_destination(listener, capabilities, parameters)

    def _make_destination(
        self, listener: Listener, capabilities: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[dict[str, object]]:
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
            Parameters().with_changes(parameters),
        )
        return _described(listener)

    def _accept(self) -> None:
        self._start("destination", self._destination.run)

    def _recover_destination(self, uri: str, fds: Sequence[int] = ()) -> list[dict[str, object]]:
        address = parse(_uri(uri, fds))
        self._check_paused()
        self._destination.stop_waiting()
        while not self._join(_LOOK_S):
            self._check_paused()  # the source may have come back that very moment
        listener = Listener(address)
        self._recover_at(listener)
        return _described(listener)

    def _recover_at(self, listener: Listener) -> None:
        self._destination.begin_recovery(listener)
        self._start("destination", self._destination.recover)

    def _adopt_destination(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],
        fds: Sequence[int] = (),
    ) -> list[dict[str, object]]:
        """Stand in for an engine that has died while the guest ran; wait where it was reached."""
        self._progress = Progress(self._report, Status.POSTCOPY_PAUSED)
        guest = self._proxy()
        self._ram = PagedRam(guest.regions(), guest.page_maps())
        self._populating = Populating(guest, self._ram, 0)
        listener = Listener(parse(_uri(uri, fds)))
        addresses = self._make_destination(listener, capabilities, parameters)
        self._destination.adopt()
        self._recover_at(listener)
        return addresses

    @property
    def _destination(self) -> Destination:
        if not isinstance(self._job, Destination):
            raise WrongState("this engine runs no incoming migration")
        return self._job

    def _set_capabilities(self, capabilities: Sequence[str]) -> None:
        if isinstance(self._job, Destination):
            self._job.set_capabilities(Capabilities.of(capabilities))

    # --- a restore

    def _start_restore(
        self, wishes: dict[str, Any], parameters: Mapping[str, Any], **_: object
    ) -> str:
        """Open the image; return what tells it from others."""
        if self._populating is not None:
            self._populating.stop()
        guest = self._proxy()
        ram = self._ram or PagedRam(guest.regions(), guest.page_maps())
        self._job = restore = Restore(
            guest,
            ram,
            RestoreWishes.of(wishes),
            self._progress,
            Parameters().with_changes(parameters),
            lambda: self._link.note("progressed"),
        )
        return restore.identity

    def _begin_restore(self) -> None:
        self._start("restore", self._restore.run)

    def _adopt_restore(self, status: str, **arguments: Any) -> None:
        """Stand in for an engine that has died, wherever it was."""
        self._progress = Progress(self._report, Status(status))
        self._start_restore(**arguments)
        self._start("restore", self._restore.adopt)

    def _hurry(self, *, wanted: bool) -> None:
        self._restore.hurry(wanted=wanted)

    @property
    def _restore(self) -> Restore:
        if not isinstance(self._job, Restore):
            raise WrongState("this engine restores nothing")
        return self._job

    # --- all

    def _start(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=_guarded, args=(run,), name=name, daemon=True)
        with self._starting:  # or others could take the one before for it
            thread.start()
            self._thread = thread

    def _join(self, timeout_s: float | None = None) -> bool:
        """Wait for a job that has paused to let go of everything; return whether it has."""
        with self._starting:
            thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def _check_paused(self) -> None:
        if self._progress.status is not Status.POSTCOPY_PAUSED:
            raise WrongState(f"nothing to recover from: {self._progress.status.value}")

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


def _uri(uri: str, fds: Sequence[int]) -> str:
    """Where to go; a descriptor that came along has a number of this process."""
    return f"fd:{fds[0]}" if fds else uri


def _described(listener: Listener) -> list[dict[str, object]]:
    described = (address.to_qapi() for address in listener.addresses)
    return [address for address in described if address is not None]


def _guarded(run: Callable[[], None]) -> None:
    """Run a job; a fault of ours ends the process, and the guest's process decides what it means."""
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
