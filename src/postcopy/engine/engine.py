"""One engine: takes orders over the link, and runs the one job that its process is for.

Each kind of job is a module of its own, which is imported when it is first needed: what the other kinds
need would keep a guest waiting that is to wake at once.  An engine that waits for a job of any kind imports
all of them beforehand: see :meth:`Engine.preload`.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from postcopy.errors import PostcopyError, WrongState
from postcopy.guest import AddressSpace, Guest
from postcopy.kernel import threads
from postcopy.link.engine.guest_proxy import guest_over
from postcopy.link.protocol import (
    BEAT_S,
    Beats,
    EngineReports,
    IncomingCommands,
    JobCommands,
    OutgoingCommands,
    ResetCommands,
    RestoreCommands,
    WatchCommands,
    messages,
)
from postcopy.link.rpc import Link, handlers
from postcopy.parameters import Capabilities, Parameters
from postcopy.statistics import MigrationInfo
from postcopy.status import ENDED, Status, StatusMachine

if TYPE_CHECKING:
    from postcopy.destination.incoming_ram import Populating
    from postcopy.paging.ram import IncomingRam

_LAST_WORDS_S = 2.0
"""How long a destination that has ended stays for its source to read so: a process that ends with
unread bytes in a socket resets the connection, and takes its own last word with it.  A command carries
that word, too."""


def _outgoing(engine: "Engine") -> OutgoingCommands:
    from postcopy.engine.outgoing import Outgoing

    return Outgoing(engine)


def _incoming(engine: "Engine") -> IncomingCommands:
    from postcopy.engine.incoming import Incoming

    return Incoming(engine)


def _restoring(engine: "Engine") -> RestoreCommands:
    from postcopy.engine.restoring import Restoring

    return Restoring(engine)


def _resets(engine: "Engine") -> ResetCommands:
    from postcopy.engine.restoring import Resets

    return Resets(engine)


COMMANDS: Final[dict[type[Any], Callable[["Engine"], Any]]] = {
    OutgoingCommands: _outgoing,
    IncomingCommands: _incoming,
    RestoreCommands: _restoring,
    ResetCommands: _resets,
}
"""The kinds of orders, and what makes their implementation."""


class Job(Protocol):
    """A source, snapshot, destination or restore."""

    @property
    def error(self) -> PostcopyError | None:
        """Why it has failed or paused."""

    def info(self) -> MigrationInfo:
        """The figures as they are now."""

    def pause(self) -> None:
        """Break its connection."""

    def set_parameters(self, parameters: Parameters) -> None:
        """Take over parameters that the user has changed meanwhile."""


class Engine(JobCommands, WatchCommands):
    """The guest, the job and the status of one engine.

    :param connection: to the guest's process.
    :ivar take_capabilities: called when the user has changed them meanwhile; only a destination cares.
    :ivar take_space: called when one more process has the guest's memory mapped.
    :ivar on_exit: called when the guest's process has closed the link, before this one ends.
    :ivar end_commands: called after that, as the last thing: no command outlives this process.
    :ivar ram: of a guest that is to arrive, or to wake.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._ended = threading.Event()
        orders = {
            order: partial(self._dispatch, kind, order)
            for kind in COMMANDS
            for order in messages(kind)
        }
        self.link = Link(connection, orders, on_end=self._ended.set, name="guest-link")
        self.link.serve(handlers(JobCommands, self) | handlers(WatchCommands, self))
        self._loading = threading.Lock()
        # Under the lock.
        self._commands: dict[type[Any], Any] = {}
        self.job: Job | None = None
        self.on_exit: Callable[[], None] = lambda: None
        self.end_commands: Callable[[], None] = lambda: None
        self.take_space: Callable[[AddressSpace], None] = lambda space: os.close(space.userfaultfd)
        self.take_capabilities: Callable[[Capabilities], None] = lambda _: None
        self.ram: IncomingRam | None = None
        self.populating: Populating | None = None
        self.progress = StatusMachine(self._report, Status.SETUP)
        self._guest: Guest | None = None
        self._starting = threading.Lock()
        # Under the lock: the job's thread, which has been started.
        self._thread: threading.Thread | None = None
        self._setting = threading.Lock()
        # Under the lock: what the user has set last, if anything since this engine was put to work.
        self._told: Parameters | None = None

    def preload(self, kinds: Iterable[type[Any]]) -> None:
        """Be ready for orders of these kinds."""
        for kind in kinds:
            self._implementation(kind)

    def tell_fault(self, fault: BaseException) -> None:
        """Say what this process is about to end of, where a user can do something about it."""
        if isinstance(fault, PostcopyError | OSError):
            self.link.note(EngineReports.fault, str(fault))

    def run(self) -> None:
        """Serve until the guest's process closes the link; then this process ends."""
        self.link.start()
        self._ended.wait()
        self.on_exit()
        if self.progress.status in ENDED:
            self.join(_LAST_WORDS_S)
        self.end_commands()
        # Threads may wait in calls that nothing will end; all that matters outlives us elsewhere.
        os._exit(0)

    def _dispatch(self, kind: type[Any], order: str, *arguments: Any, **named: Any) -> Any:
        return getattr(self._implementation(kind), order)(*arguments, **named)

    def _implementation(self, kind: type[Any]) -> Any:
        with self._loading:
            if kind not in self._commands:
                self._commands[kind] = COMMANDS[kind](self)
            return self._commands[kind]

    # --- what the orders of one kind share

    def guest(self) -> Guest:
        """The guest; asked about itself when it is first needed."""
        if self._guest is None:
            self._guest = guest_over(self.link)
        return self._guest

    def take_ram(self) -> "IncomingRam":
        """The guest's memory with its page maps."""
        from postcopy.paging.ram import IncomingRam

        if self.ram is None:
            guest = self.guest()
            self.ram = IncomingRam(guest.regions(), guest.page_maps())
        return self.ram

    def take_over(self, status: Status) -> None:
        """Begin where an engine that has died had come to."""
        self.progress = StatusMachine(self._report, status)

    def set_job(self, job: Job) -> None:
        """Have this job.

        Its order was written before it came here, and was making the job since: what the user has set
        meanwhile is newer, and counts.
        """
        with self._setting:
            self.job = job
            if self._told is not None:
                job.set_parameters(self._told)

    def start(self, name: str, run: Callable[[], None]) -> None:
        """Run the job, or go on with it, on a thread of its own."""
        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._starting:  # or others could take the one before for it
            self._thread = threads.start(thread)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for a job that has paused to let go of everything; return whether it has."""
        with self._starting:
            thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def check_paused(self) -> None:
        """Refuse to recover what is not paused.

        :raises WrongState: it is not.
        """
        if self.progress.status is not Status.POSTCOPY_PAUSED:
            raise WrongState(f"nothing to recover from: {self.progress.status.value}")

    # --- orders that every engine understands: see JobCommands, WatchCommands

    def set_parameters(self, parameters: Parameters) -> None:
        with self._setting:
            self._told = parameters
            if self.job is not None:
                self.job.set_parameters(parameters)

    def set_capabilities(self, capabilities: Capabilities) -> None:
        self.take_capabilities(capabilities)

    def share(self, space: AddressSpace) -> None:
        self.take_space(space)

    def pause(self) -> None:
        if self.job is not None:
            self.job.pause()

    def info(self) -> MigrationInfo:
        if self.job is None:
            raise WrongState("this engine has nothing to do yet")
        return self.job.info()

    def say_alive(self) -> None:
        thread = threading.Thread(target=self._beat, name="alive", daemon=True)
        if not threads.start_if_possible(thread):
            self.link.close()  # it would be taken for one that hangs

    def _beat(self) -> None:
        while not self._ended.is_set():
            self.link.note(Beats.alive)
            self._ended.wait(BEAT_S)

    def _report(self, status: Status) -> None:
        """Tell the guest's process; called with each change, in order."""
        assert self.job is not None
        error = self.job.error
        text = str(error) if error is not None else None
        self.link.note(EngineReports.status, status, text, self.job.info())
