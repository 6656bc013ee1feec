"""What has been ordered of a guest, and each migration, snapshot or restore from its order to its end."""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from postcopy.errors import EngineDied, WrongState
from postcopy.link.guest.settings import Settings
from postcopy.link.protocol import JobCommands
from postcopy.link.rpc import Link
from postcopy.parameters import Capability
from postcopy.statistics import Measured, MigrationInfo
from postcopy.status import ENDED, Progress, Status

_INFO_TIMEOUT_S = 5
_LAST_WORDS = ENDED - {Status.NONE}


class Job:
    """What there is to say of it: where it stands, its figures, what went wrong.

    :param incoming: the guest comes here.
    :param settings: what it begins with; those of the process may change, and it keeps these.
    :param tell: gets each change of the status.
    :param after: the restore that has to complete first.
    """

    def __init__(
        self,
        tell: Callable[["Job", Status], None],
        *,
        incoming: bool,
        settings: Settings | None = None,
        after: "Job | None" = None,
    ) -> None:
        self.incoming = incoming
        self.settings = settings or Settings()
        self.error: str | None = None
        self.addresses: tuple[Mapping[str, Any], ...] = ()
        self.progress = Progress(lambda status: tell(self, status))
        self._after = after
        self._last = MigrationInfo(incoming=incoming)

    @property
    def status(self) -> Status:
        """Where it stands now."""
        return self.progress.status

    @property
    def busy(self) -> bool:
        """Whether it goes on still."""
        return self.status not in ENDED

    @property
    def is_snapshot(self) -> bool:
        """Whether the guest stays, and only an image of it leaves."""
        return not self.incoming and self.settings.enabled(Capability.BACKGROUND_SNAPSHOT)

    @property
    def order(self) -> str:
        """What the user has ordered of a guest that leaves."""
        return "snapshot" if self.is_snapshot else "migrate"

    def note(self, figures: MigrationInfo, error: str | None) -> None:
        """Keep what its engine says with a change of the status."""
        self._last, self.error = figures, error

    def ask(self, link: Link, lock: AbstractContextManager[object]) -> None:
        """Have its engine say how it stands now, if it goes on and the engine can.

        :param lock: held while what the engine says is noted.
        """
        if not self.busy:
            return
        try:
            found = link.ask(JobCommands.info).wait(_INFO_TIMEOUT_S)
        except (EngineDied, TimeoutError, WrongState):  # WrongState: not begun yet
            return  # then what we have is the best there is
        with lock:
            if self._last.status not in _LAST_WORDS:  # its last word may have come meanwhile
                self._last = found

    def forget(self) -> None:
        """Its figures mean nothing any more."""
        self._last = MigrationInfo(incoming=self.incoming)

    def info(self) -> MigrationInfo:
        """How it stands, by the last figures that it gave."""
        status = self.status  # first: the figures that belong to it have come before it changed
        last = self._last
        measured = last.measured
        if self._after is not None:
            measured = _completed(measured, self._after.info().measured)
        return replace(
            last,
            status=status,
            incoming=self.incoming,
            error_desc=self.error or last.error_desc,
            socket_address=self.addresses if self.incoming else (),
            measured=measured,
        )


class OrderLock:
    """A lock that its holder may take again, and that knows whether the caller holds it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # Under the lock.
        self._holder: int | None = None
        self._depth = 0

    @property
    def is_held(self) -> bool:
        """Whether the calling thread holds it."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
        self._lock.release()


@dataclass(slots=True, eq=False)
class Current:
    """What the user has ordered last, and what that has come to; changed under :attr:`lock`.

    :ivar shown: the job that was ordered last.
    :ivar awaits: this process waits for a guest to come.
    :ivar expecting: an engine is being told where, or from which image.
    :ivar listening: and has been told.
    :ivar exit_on_error: the process ends when no guest comes.
    :ivar uri: where an outgoing guest was sent last.
    :ivar lock: no engine is called under it, since what an engine says meanwhile is taken under it.
    """

    shown: Job
    awaits: bool
    expecting: bool = False
    listening: bool = False
    exit_on_error: bool = False
    uri: str = ""
    lock: OrderLock = field(default_factory=OrderLock)


def _completed(measured: Measured | None, before: Measured | None) -> Measured | None:
    """What was measured, and where nothing was, what had been before."""
    if measured is None or before is None:
        return measured or before
    names = [each.name for each in fields(Measured)]
    empty = {name: getattr(before, name) for name in names if getattr(measured, name) in {None, ()}}
    return replace(measured, **empty)
