"""A migration, or snapshot, of a guest that is still being restored: it begins when the guest is whole.

The order is taken at once, and can be watched and cancelled like every other.  The restore goes on behind
it, at full speed; only when the order is given up does it fall back to its own pace.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from postcopy.errors import HostCannot, PostcopyError
from postcopy.kernel import threads
from postcopy.kernel.calls import close_all, open_all
from postcopy.link.guest.engine_slot import EngineSlot
from postcopy.link.guest.job import Job
from postcopy.link.guest.restoring import Restoring
from postcopy.link.protocol import OutgoingCommands
from postcopy.link.rpc import Link
from postcopy.status import ENDED, Status

_WOKEN = frozenset({*ENDED, Status.POSTCOPY_PAUSED})


@dataclass(slots=True, eq=False)
class _Order:
    """Where the guest is to go.

    :ivar fds: descriptors of our own that the address means.
    :ivar postcopy: the user has asked for postcopy meanwhile.
    """

    job: Job
    uri: str
    fds: Sequence[int]
    postcopy: bool = False


class QueuedMigration:
    """At most one order that waits for a restore.

    Invariant, under ``lock``: while there is one, its job's status is ``setup``.

    :param lock: held while what the engine at work does is changed; may be taken more than once.
    :param begin: has an engine send the guest to an address, or raises after the job has failed.
    :param begin_move: takes the guest for the order once it is whole, or raises what speaks against it;
        called under the lock.
    """

    def __init__(
        self,
        lock: AbstractContextManager[object],
        restoring: Restoring,
        engines: EngineSlot,
        begin: Callable[[Job, Link, str, Sequence[int]], None],
        begin_move: Callable[[Job], None],
    ) -> None:
        self._lock = lock
        self._restoring = restoring
        self._engines = engines
        self._begin = begin
        self._begin_move = begin_move
        self._order: _Order | None = None

    def take(self, job: Job, uri: str, fds: Sequence[int]) -> None:
        """Take the order; a thread of its own sees to it.

        :raises HostCannot: there can be no more threads, and the order has failed.
        """
        assert self._restoring.job is not None
        restore = self._restoring.job
        order = _Order(job, uri, open_all(os.dup, fds))
        thread = threading.Thread(target=self._see_to, args=(order, restore), name="departing")
        thread.daemon = True
        self._order = order
        job.progress.move(Status.SETUP)
        self._restoring.hurry()
        try:
            threads.start(thread)
        except HostCannot as error:
            close_all(order.fds)
            self.fail(str(error))
            raise

    def start_postcopy(self) -> bool:
        """Note that postcopy is wanted; return whether there is an order that could want it."""
        with self._lock:
            if self._order is not None:
                self._order.postcopy = True
            return self._order is not None

    def cancel(self) -> bool:
        """Give the order up; return whether there was one."""
        with self._lock:
            order, self._order = self._order, None
            if order is None:
                return False
            order.job.progress.move(Status.CANCELLING)
            order.job.progress.move(Status.CANCELLED)
            self._restoring.hurry(wanted=False)
            return True

    def fail(self, reason: str) -> None:
        """It cannot begin; harmless without an order."""
        with self._lock:
            order, self._order = self._order, None
            if order is not None:
                order.job.error = reason
                order.job.progress.move(Status.FAILED)
                self._restoring.hurry(wanted=False)

    def _see_to(self, order: _Order, restore: Job) -> None:
        try:
            restore.progress.wait(*_WOKEN)
            with self._lock:
                if self._order is not order:
                    return
                self._restoring.refuse_to_leave()
                link = self._engines.start()
                self._begin_move(order.job)
                self._order = None
            self._begin(order.job, link, order.uri, order.fds)
            if order.postcopy:
                link.note(OutgoingCommands.start_postcopy)
        except PostcopyError as error:
            self.fail(str(error))  # nothing more to say of an order that has become a migration
        finally:
            close_all(order.fds)
