"""What an engine's statuses, and its end, mean for the guest and for its user."""

from collections.abc import Callable

from postcopy.channel.address import parse
from postcopy.channel.partial_file import remove_partial
from postcopy.errors import PostcopyError
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.engine_slot import EngineSlot
from postcopy.link.guest.job import Current, Job
from postcopy.link.guest.keeper import GuestKeeper, OwnedGuest
from postcopy.link.guest.recovery import Recovery
from postcopy.link.guest.restoring import Restoring
from postcopy.link.protocol import EngineReports
from postcopy.ownership import Move, Owner
from postcopy.statistics import MigrationInfo
from postcopy.status import ENDED, GIVEN_UP, Status, has_switched_over
from postcopy.trace import trace

_SPARE_DELAY_S = 2.0  # how long a guest that has just arrived has the CPUs to itself


class Outcome:
    """Brings a job to its end, or past the death of its engine.

    :param on_moved: called when the guest has moved away for good.
    :param on_incoming_failed: called with the reason when no guest will come.
    """

    def __init__(
        self,
        guest: OwnedGuest,
        keeper: GuestKeeper,
        engines: EngineSlot,
        current: Current,
        on_moved: Callable[[], None],
        on_incoming_failed: Callable[[str], None],
    ) -> None:
        self._guest = guest
        self._ownership = guest.ownership
        self._keeper = keeper
        self._engines = engines
        self.current = current
        """What has been ordered."""
        self.on_moved = on_moved
        self.on_incoming_failed = on_incoming_failed
        self.recovery = Recovery(engines, lambda: current.shown, self.settle_if_arrived)
        """Goes on with a broken postcopy."""
        self.restoring = Restoring(engines, guest, self.restore_given_up)
        """Goes on with a restore."""

    @property
    def work(self) -> Job:
        """What the engine at work does: a restore may go on behind a migration that waits for it."""
        return self.restoring.job or self.current.shown

    def on_status(
        self, engine: EngineProcess, to: Status, error: str | None, info: MigrationInfo
    ) -> None:
        """An engine says that its job has got somewhere; on the link's reader thread."""
        with self.current.lock:
            if self._engines.current is not engine:
                return  # given up, in the moment in which it had something to say
            job = self.work
            job.note(info, error)
            runs = job is self.restoring.job and self._guest.owned
            # With no page missing any more those that are lost are the result.
            if to is Status.FAILED and runs and self._keeper.watches_missing:
                self.restoring.engine_died()  # the next engine goes on with the guest's pages
                return
        if to is Status.COMPLETED:
            self._completed()
        if to in {Status.FAILED, Status.CANCELLED, Status.POSTCOPY_PAUSED}:
            self._ownership.try_move(Move.LOSE_TOUCH)
        if to is Status.POSTCOPY_ACTIVE:
            if job.incoming:
                self._ownership.try_move(Move.ARRIVING)
            self.recovery.works()
        if to in ENDED:
            self.settle(to)
        else:
            job.progress.move(to)

    def _completed(self) -> None:
        if self.work.incoming:
            self.current.awaits = False
        elif not self.work.is_snapshot:
            self._ownership.try_move(Move.MOVED)  # what was saved stays saved
            self.on_moved()

    def settle(self, status: Status) -> None:
        """Say that it has ended, and let go of the engine.

        Under the lock: a caller that has seen the end, and closes us, finds nothing still going on.
        """
        job, ownership = self.work, self._ownership
        with self.current.lock:
            no_guest_comes = status is Status.FAILED and job.incoming and self._keeper.abandon()
            stands_still = ownership.owner is Owner.STOPPED
            ownership.try_move(Move.END)
            self.restoring.end()
            job.progress.move(status)
            self.current.listening = False
            self.current.awaits = self.current.awaits and not self._guest.owned
            self._engines.end()
            if self._guest.owned:
                self._engines.prepare(_SPARE_DELAY_S)
        if stands_still:
            self._resume_guest()
        if no_guest_comes and self.current.exit_on_error:
            self.on_incoming_failed(job.error or "the migration failed")

    def engine_ended(self, engine: EngineProcess) -> None:
        """The link is gone: nothing new if we ended it, or if it had finished.

        Under the lock: what is just being ordered of it has been noted then.
        """
        trace("guest.engine-ended", engine=engine.process_id)
        with self.current.lock:
            if self._engines.current is engine:
                self._engine_died(engine)

    def _engine_died(self, engine: EngineProcess) -> None:
        job = self.work
        if not job.busy:
            self._engines.end()  # it was ready for a migration: that will get another
            return
        if self.settle_if_arrived():
            return
        if job is self.restoring.job and self._ownership.owner is not Owner.ABANDONED:
            self.restoring.engine_died()
            return
        if has_switched_over(job.status, incoming=job.incoming):
            self._engine_lost(engine.fate)
            return
        job.error = f"the engine process {engine.fate}; start the migration again"
        if not job.incoming:
            self._keeper.unwatch_writes()
            self._keeper.unwatch_snapshot()
            if job.is_snapshot:
                engine.kill()  # its link goes first, and then the claim on what it was writing
                remove_partial(parse(self.current.uri))  # no half image is left behind
            if self._guest.owned:
                self._ownership.try_move(Move.END)
                self._resume_guest()
            else:
                self._ownership.try_move(Move.LOSE_TOUCH)
                job.error = (
                    f"the engine process {engine.fate} while handing the guest over; the destination "
                    "may be running it, so it stays stopped here: 'cont' takes it back"
                )
        self.settle(Status.CANCELLED if job.status is Status.CANCELLING else Status.FAILED)

    def _has_arrived(self) -> bool:
        """Whether an engine has nothing left to do but to say so."""
        if not self.work.incoming:
            return self.work.status in GIVEN_UP and self._ownership.owner is Owner.MOVED
        return self._guest.owned and not self._keeper.watches_missing

    def _engine_lost(self, fate: str) -> None:
        """Nothing is lost with an engine after switchover: all that it knew is here, or at the peer."""
        self._engines.end()
        self._ownership.try_move(Move.LOSE_TOUCH)
        job = self.current.shown
        if job.incoming and not self._guest.owned:
            self._resume_guest()  # its devices are loaded, and the source has been told so
        job.error = f"the engine process {fate}; no page is lost: recover the migration"
        job.progress.move(Status.POSTCOPY_PAUSED, only_from=GIVEN_UP - {Status.POSTCOPY_PAUSED})
        if job.incoming:
            self.recovery.engine_died()

    def restore_given_up(self, reason: str) -> None:
        """No engine can go on with a restore."""
        self.work.error = reason
        if self._keeper.abandon():
            self.settle(Status.FAILED)

    def settle_if_arrived(self) -> bool:
        """An engine may die with nothing left to do, or while its last call is answered here."""
        if not (self.work.busy and self._has_arrived()):
            return False
        self.work.error = None
        self._completed()
        self.settle(Status.COMPLETED)
        return True

    def _resume_guest(self) -> None:
        try:
            self._guest.resume()
        except PostcopyError as error:
            self.current.shown.error = (
                f"{self.current.shown.error}; and the guest cannot go on: {error}"
            )


class Reports(EngineReports):
    """Takes what one engine tells of itself; on the link's reader thread.

    :param on_pass: told which pass over all memory begins.
    """

    def __init__(
        self, engine: EngineProcess, outcome: Outcome, on_pass: Callable[[int], None]
    ) -> None:
        self._engine = engine
        self._outcome = outcome
        self._on_pass = on_pass

    def status(self, status: Status, error: str | None, info: MigrationInfo) -> None:
        self._outcome.on_status(self._engine, status, error, info)

    def fault(self, reason: str) -> None:
        self._engine.fails(reason)

    def passed(self, number: int) -> None:
        self._on_pass(number)

    def progressed(self) -> None:
        self._outcome.restoring.engine_works()
