"""What an engine's orders share: the guest, and the one job that this process is for."""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from postcopy.errors import PostcopyError, WrongState
from postcopy.guest import AddressSpace, Guest
from postcopy.kernel import threads
from postcopy.link.engine.guest_proxy import guest_over
from postcopy.link.protocol import EngineReports
from postcopy.link.rpc import Link
from postcopy.parameters import Capabilities, Parameters
from postcopy.statistics import MigrationInfo
from postcopy.status import Progress, Status

if TYPE_CHECKING:
    from postcopy.destination.incoming_ram import Populating
    from postcopy.paging.ram import IncomingRam


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


class EngineContext:
    """One engine's guest, job and status.

    :ivar take_capabilities: called when the user has changed them meanwhile; only a destination cares.
    :ivar take_space: called when one more process has the guest's memory mapped.
    :ivar on_exit: called when the guest's process has closed the link, before this one ends.
    :ivar end_commands: called after that, as the last thing: no command outlives this process.
    :ivar ram: of a guest that is to arrive, or to wake.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.job: Job | None = None
        self.on_exit: Callable[[], None] = lambda: None
        self.end_commands: Callable[[], None] = lambda: None
        self.take_space: Callable[[AddressSpace], None] = lambda space: os.close(space.userfaultfd)
        self.take_capabilities: Callable[[Capabilities], None] = lambda _: None
        self.ram: IncomingRam | None = None
        self.populating: Populating | None = None
        self.progress = Progress(self._report, Status.SETUP)
        self._guest: Guest | None = None
        self._starting = threading.Lock()
        # Under the lock: the job's thread, which has been started.
        self._thread: threading.Thread | None = None
        self._setting = threading.Lock()
        # Under the lock: what the user has set last, if anything since this engine was put to work.
        self._told: Parameters | None = None

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
        self.progress = Progress(self._report, status)

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

    # --- orders that every job understands: see JobCommands

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

    def _report(self, status: Status) -> None:
        """Tell the guest's process; called with each change, in order."""
        assert self.job is not None
        error = self.job.error
        text = str(error) if error is not None else None
        self.link.note(EngineReports.status, status, text, self.job.info())
