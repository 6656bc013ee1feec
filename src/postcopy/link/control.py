"""The migration subsystem of one guest's process: what its monitor drives.

It checks what may be asked when, starts an engine for each migration, mirrors the engine's status, and
decides what an engine's death means.  The figures are the engine's; it is asked for them.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from postcopy.channel.address import parse
from postcopy.channel.partial_file import remove_partial
from postcopy.errors import EngineDied, PostcopyError, WrongState
from postcopy.events import EventBus
from postcopy.link import loss
from postcopy.link.departing import Departing
from postcopy.link.engine_process import EnginePool, EngineProcess
from postcopy.link.engines import Engines
from postcopy.link.guest_service import GuestService, OwnedGuest
from postcopy.link.host import check_movable, check_transport
from postcopy.link.job import Job
from postcopy.link.places import descriptors
from postcopy.link.recovery import Recovery
from postcopy.link.resetting import Resetting
from postcopy.link.restoring import Restoring
from postcopy.link.rpc import Handler, Link
from postcopy.link.settings import Settings
from postcopy.ownership import Move, Owner
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.statistics import MigrationInfo
from postcopy.status import AFTER_SWITCHOVER, ENDED, Progress, Status

_SPARE_DELAY_S = 2.0  # how long a guest that has just arrived has the CPUs to itself


class MigrationControl:
    """Both directions of one guest; any thread may call any method.

    :param incoming: this process waits for a guest to come.
    :param on_moved: called when the guest has moved away for good.
    :param on_incoming_failed: called with the reason when no guest will come.
    :param engines: where engines come from, ours from now on.
    """

    def __init__(
        self,
        guest: OwnedGuest,
        events: EventBus,
        *,
        incoming: bool = False,
        on_moved: Callable[[], None] = lambda: None,
        on_incoming_failed: Callable[[str], None] = lambda _: None,
        engines: EnginePool | None = None,
    ) -> None:
        self._guest = guest
        self._ownership = guest.ownership
        self._events = events
        self._awaits = incoming
        self._on_moved = on_moved
        self._on_incoming_failed = on_incoming_failed
        pool = engines or EnginePool()
        self._engines = Engines(self._handlers, self._engine_ended, pool)
        self._settings = Settings()
        self._recovery = Recovery(
            self._engines,
            lambda: self._shown,
            self._settings.to_wire,
            self._settle_if_arrived,
        )
        self._restoring = Restoring(
            self._engines, guest, self._settings.to_wire, self._restore_given_up
        )
        self._service = GuestService(guest)
        self._lock = threading.RLock()
        self._check_movable = partial(check_movable, guest, self._service)
        self._departing = Departing(
            self._lock, self._restoring, self._engines, self._begin, self._begin_move
        )
        check, complete = self._check_can_start, self._restoring.complete_first
        self.resetting = Resetting(guest, self._service, pool, self._lock, check, complete)
        # Under the lock: what is set, the engine at work, and what was ordered last.
        self._listening = False
        self._exit_on_error = False
        self._last_uri = ""
        self._shown = Job(self._tell, incoming=incoming)

    def prepare(self) -> None:
        """Start what takes time: an engine, and for a destination its memory."""
        self._engines.prepare()
        self._service.prepare()
        if self._awaits:
            with suppress(EngineDied):  # 'incoming' starts another
                self._engines.start().call("prepare_destination")

    def close(self) -> None:
        """End whatever is going on; the process is leaving."""
        self.resetting.close()
        with self._lock:
            self._engines.close()
        self._service.unwatch_snapshot()  # no vCPU is left waiting for an engine that is gone

    # --- settings

    @property
    def capabilities(self) -> Capabilities:
        """What is on."""
        return self._settings.capabilities

    @property
    def parameters(self) -> Parameters:
        """What is set."""
        return self._settings.parameters

    def set_capabilities(self, changes: Mapping[Capability, bool]) -> None:
        """Switch capabilities, all of them or none."""
        with self._lock:
            # A destination that waits may still be told; QEMU refuses some by name then.
            job = self._shown
            waits = self._awaits and job.incoming and job.status is Status.SETUP
            if job.busy and not (waits or job is self._restoring.job):
                raise WrongState("There's a migration process in progress")
            started = self._listening and self._restoring.job is None
            self._settings.switch(changes, awaits=self._awaits, incoming_started=started)
            if self._listening:
                # A note, not a call: the engine may have something to tell that needs this lock.
                self._engines.tell("set_capabilities", capabilities=list(self.capabilities))

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Set parameters by QEMU's names; a migration under way takes them over."""
        with self._lock:
            self._settings.set(changes)
            if self._work.busy:
                self._engines.tell("set_parameters", parameters=self.parameters.to_qapi())

    # --- orders

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        """Begin to send the guest to ``uri``."""
        check_transport(parse(uri), self.capabilities)
        if resume:
            self._resume(uri)
            return
        with descriptors(parse(uri)) as fds:  # refused before anything moves
            with self._lock:
                self._check_can_start()
                after = self._restoring.job
                self._last_uri = uri
                self._ownership.ordered(self._what_leaves, "outgoing", uri)
                self._shown = job = Job(self._tell, incoming=False, after=after)
                if after is not None:
                    self._departing.take(job, uri, fds)
                    return
                self._begin_move()
                job.progress.move(Status.SETUP)
                try:
                    link = self._engines.start()
                except PostcopyError as error:
                    self._not_begun(job, error)
                    raise
            self._begin(job, link, uri, fds)

    def _begin(self, job: Job, link: Link, uri: str, fds: Sequence[int]) -> None:
        """Have an engine send the guest.

        :raises PostcopyError: it cannot, and the migration has failed; silently nothing when it has died:
            the end of the link has been dealt with, as the status says.
        """
        try:
            link.call("start_source", fds=fds, uri=uri, **self._settings.to_wire())
        except EngineDied:
            link.wait_over()
        except PostcopyError as error:
            self._not_begun(job, error)
            raise

    def _not_begun(self, job: Job, error: PostcopyError) -> None:
        """What was ordered has failed before anything of it was done to the guest."""
        with self._lock:
            if self._work is job and job.busy:
                job.error = str(error)
                self._settle(Status.FAILED)

    def incoming(self, uri: str, *, exit_on_error: bool = True) -> None:
        """Listen for a guest."""
        with self._lock:
            address = parse(uri)
            link = self._expect(exit_on_error, "migrate-incoming", uri)
            check_transport(address, self.capabilities)
            job = Job(self._tell, incoming=True)
            with descriptors(address) as fds:
                found = link.call("listen", fds=fds, uri=uri, **self._settings.to_wire())
            job.addresses = tuple(found)
            self._begin_incoming(job)
            self._recovery.listens_at(uri)
        link.note("accept")

    @property
    def _photographs(self) -> bool:
        """Whether an outgoing order is a background snapshot: the guest stays."""
        return self._settings.enabled(Capability.BACKGROUND_SNAPSHOT)

    @property
    def _what_leaves(self) -> str:
        return "snapshot" if self._photographs else "migrate"

    def _begin_move(self) -> None:
        """An outgoing order begins; under the lock.

        :raises WrongState: the guest is not here, not whole, or has a reset point.
        """
        self._check_movable()
        if not self._photographs:
            self._ownership.move(Move.ORDER)

    def _expect(self, exit_on_error: bool, name: str, uri: str) -> Link:  # noqa: FBT001 - as QMP names it
        if not self._awaits:
            raise WrongState("'-incoming' was not specified on the command line")
        if self._listening:
            raise WrongState("The incoming migration has already been started")
        self._exit_on_error = exit_on_error
        self._ownership.move(Move.AWAIT)
        self._ownership.ordered(name, "incoming", uri)
        link = self._engines.link
        if link is None or self._shown.status is not Status.NONE:
            link = self._engines.start()
        return link

    def _begin_incoming(self, job: Job) -> None:
        self._shown = job
        self._listening = True
        job.progress.move(Status.SETUP)

    def restore(self, path: str, *, exit_on_error: bool = True, **wishes: Any) -> None:
        """Wake the guest of an image: see :class:`postcopy.monitor.backend.MigrationControl`."""
        with self._lock:
            link = self._expect(exit_on_error, "restore", path)
            job = Job(self._tell, incoming=True)
            self._restoring.begin(job, link, path, **wishes)
            self._begin_incoming(job)
        link.note("restore")

    def start_postcopy(self) -> None:
        """Switch over as soon as possible."""
        if not self._settings.enabled(Capability.POSTCOPY_RAM):
            raise WrongState(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        if self._shown.status is Status.NONE:
            raise WrongState("Postcopy must be started after migration has been started")
        if self._departing.start_postcopy():
            return
        if self._shown.busy and not self._shown.incoming:
            self._engines.tell("start_postcopy")

    def cancel(self) -> None:
        """Give up the outgoing migration."""
        if self._departing.cancel() or self._shown.incoming or not self._shown.busy:
            return
        if self._shown.status in AFTER_SWITCHOVER:
            raise WrongState("Postcopy migration in progress, cannot cancel.")
        # From here on no engine can hand the guest over; if one was quicker, this is refused.
        self._ownership.move(Move.CANCEL)
        self._engines.tell("cancel")

    def continue_(self, state: Status) -> None:
        """Leave ``pre-switchover``."""
        if self._shown.status is not state:
            raise WrongState(f"Migration not in expected state: {self._shown.status.value}")
        self._engines.tell("proceed")

    def pause(self) -> None:
        """Break a postcopy on purpose."""
        self._restoring.refuse_pause()
        if self._shown.status not in {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER}:
            raise WrongState(
                "migrate-pause is currently only supported during postcopy-active or "
                "postcopy-recover state"
            )
        self._engines.tell("pause")

    def recover(self, uri: str) -> None:
        """Listen anew for the source of a paused postcopy."""
        self._show_paused_restore()
        if self._shown.status is not Status.POSTCOPY_PAUSED or not self._shown.incoming:
            raise WrongState("Migrate recover can only be run when postcopy is paused.")
        if self._restoring.job is not None:
            self._restoring.recover(uri)
            return
        check_transport(parse(uri), self.capabilities)
        self._recovery.listen(uri)

    def _show_paused_restore(self) -> None:
        """Whoever deals with it need not be told any more of a migration that could not begin."""
        with self._lock:
            restore = self._restoring.job
            if restore is not None and restore.status is Status.POSTCOPY_PAUSED:
                self._departing.fail("the guest's restore is paused")
                self._shown = restore

    def lost(self) -> None:
        """Give up on the source of a paused postcopy, as the parameter ``x-on-loss`` says."""
        self._show_paused_restore()
        with self._recovery.lock, self._lock:
            job = self._shown
            if job.status is not Status.POSTCOPY_PAUSED or not job.incoming:
                raise WrongState(
                    "x-migrate-lost can only be run when an incoming postcopy is paused"
                )
            how = self.parameters.x_on_loss
            job.error = loss.settle(how, self._guest, self._service, self._engines.end)
            self._awaits = self._listening = False
            job.forget()
            self._restoring.end()
            job.progress.move(Status.FAILED)
            if how == "quit":
                self._on_incoming_failed(job.error)

    def arrived(self) -> None:
        """Somebody has seen the destination complete: nothing here is needed any more."""
        with self._recovery.lock, self._lock:
            paused = self._shown.status is Status.POSTCOPY_PAUSED
            if not paused or self._shown.incoming or self._guest.owned:
                what = "x-migrate-arrived can only be run when an outgoing postcopy is paused"
                raise WrongState(what)
            self._ownership.move(Move.MOVED)
            self._service.unwatch_writes()
            self._settle_if_arrived()

    def _resume(self, uri: str) -> None:
        """Go on with a paused postcopy at ``uri``."""
        with self._recovery.lock:
            if self._shown.status is not Status.POSTCOPY_PAUSED or self._shown.incoming:
                raise WrongState("Cannot resume if there is no paused migration")
            self._ownership.check(Move.RESUME)
            self._ownership.ordered("migrate-resume", "outgoing", uri)
            try:
                # From here until it has failed again 'cont' cannot take it back.
                self._recovery.go_on(uri, lambda: self._ownership.move(Move.RESUME))
            except PostcopyError:
                self._ownership.try_move(Move.LOSE_TOUCH)
                raise

    def info(self) -> MigrationInfo:
        """How it stands: the engine's figures as of now, or the last it gave."""
        job, link = self._shown, self._engines.link
        if job is self._work and link is not None:
            job.ask(link, self._lock)
        return job.info()

    # --- the engine

    @property
    def progress(self) -> Progress:
        """Where that stands which was ordered last."""
        return self._shown.progress

    @property
    def _work(self) -> Job:
        """What the engine at work does: a restore may go on behind a migration that waits for it."""
        return self._restoring.job or self._shown

    def _check_can_start(self) -> None:
        job = self._shown
        if job.status is Status.POSTCOPY_PAUSED and self._guest.owned and not job.incoming:
            self._settle(Status.FAILED)  # 'cont' has taken the guest back
        self._restoring.refuse_to_leave()
        if job.status is Status.POSTCOPY_PAUSED:
            raise WrongState("Can't migrate the vm that was paused due to previous migration")
        if job.busy and job is not self._restoring.job:
            raise WrongState("There's a migration process in progress")
        self._check_movable()  # again when it begins: here, so that an order that waits is refused at once

    @property
    def _engine(self) -> EngineProcess | None:
        return self._engines.current

    def _handlers(self, engine: EngineProcess) -> dict[str, Handler]:
        return self._service.handlers() | {
            "status": partial(self._on_status, engine),
            "passed": self._on_pass,
            "progressed": self._restoring.engine_works,
        }

    # --- what the engine tells; on the link's reader thread

    def _on_pass(self, number: int) -> None:
        if self._settings.enabled(Capability.EVENTS):
            self._events.emit("MIGRATION_PASS", {"pass": number})

    def _on_status(
        self, engine: EngineProcess, status: str, error: str | None, info: dict[str, Any]
    ) -> None:
        to = Status(status)
        with self._lock:
            if self._engine is not engine:
                return  # given up, in the moment in which it had something to say
            job = self._work
            job.note(MigrationInfo.from_wire(info), error)
            if to is Status.FAILED and job is self._restoring.job and self._guest.owned:
                self._restoring.engine_died()  # the guest runs: the next engine goes on with its pages
                return
        if to is Status.COMPLETED:
            self._completed()
        if to in {Status.FAILED, Status.CANCELLED, Status.POSTCOPY_PAUSED}:
            self._ownership.try_move(Move.LOSE_TOUCH)
        if to is Status.POSTCOPY_ACTIVE:
            if job.incoming:
                self._ownership.try_move(Move.ARRIVING)
            self._recovery.works()
        if to in ENDED:
            self._settle(to)
        else:
            job.progress.move(to)

    def _completed(self) -> None:
        if self._work.incoming:
            self._awaits = False
        elif not self._photographs:
            self._ownership.try_move(Move.MOVED)  # what was saved stays saved
            self._on_moved()

    def _settle(self, status: Status) -> None:
        """Say that it has ended, and let go of the engine.

        Under the lock: who has seen the end and closes us finds nothing still going on.
        """
        job, ownership = self._work, self._ownership
        with self._lock:
            no_guest_comes = status is Status.FAILED and job.incoming and self._service.abandon()
            stands_still = ownership.owner is Owner.STOPPED
            ownership.try_move(Move.END)
            self._restoring.end()
            job.progress.move(status)
            self._listening = False
            self._awaits = self._awaits and not self._guest.owned
            self._engines.end()
            if self._guest.owned:
                self._engines.prepare(_SPARE_DELAY_S)
        if stands_still:
            self._resume_guest()
        if no_guest_comes and self._exit_on_error:
            self._on_incoming_failed(job.error or "the migration failed")

    def _engine_ended(self, engine: EngineProcess) -> None:
        """The link is gone: nothing new if we ended it, or if it had finished.

        Under the lock: what is just being ordered of it has been noted then.
        """
        with self._lock:
            if self._engine is engine:
                self._engine_died(engine)

    def _engine_died(self, engine: EngineProcess) -> None:
        job = self._work
        if not job.busy:
            self._engines.end()  # it was ready for a migration: that will get another
            return
        if self._settle_if_arrived():
            return
        if job is self._restoring.job and self._ownership.owner is not Owner.ABANDONED:
            self._restoring.engine_died()
            return
        if job.status in AFTER_SWITCHOVER:
            self._engine_lost()
            return
        job.error = "the engine process died unexpectedly; start the migration again"
        if not job.incoming:
            self._service.unwatch_writes()
            self._service.unwatch_snapshot()
            if self._settings.enabled(Capability.BACKGROUND_SNAPSHOT):
                engine.kill()  # its link goes first, and then the claim on what it was writing
                remove_partial(parse(self._last_uri))  # no half image is left behind
            if self._guest.owned:
                self._ownership.try_move(Move.END)
                self._resume_guest()
            else:
                self._ownership.try_move(Move.LOSE_TOUCH)
                job.error = (
                    "the engine process died while handing the guest over; the destination may be "
                    "running it, so it stays stopped here: 'cont' takes it back"
                )
        self._settle(Status.CANCELLED if job.status is Status.CANCELLING else Status.FAILED)

    def _has_arrived(self) -> bool:
        """Whether an engine has nothing left to do but to say so."""
        if not self._work.incoming:
            return self._work.status in AFTER_SWITCHOVER and self._ownership.owner is Owner.MOVED
        return self._guest.owned and not self._service.watches_missing

    def _engine_lost(self) -> None:
        """Nothing is lost with an engine after switchover: all that it knew is here, or at the peer."""
        self._engines.end()
        self._ownership.try_move(Move.LOSE_TOUCH)
        job = self._shown
        if job.incoming and not self._guest.owned:
            self._resume_guest()  # its devices are loaded, and the source has been told so
        job.error = "the engine process died; no page is lost: recover the migration"
        job.progress.move(
            Status.POSTCOPY_PAUSED, only_from=AFTER_SWITCHOVER - {Status.POSTCOPY_PAUSED}
        )
        if job.incoming:
            self._recovery.engine_died()

    def _restore_given_up(self, reason: str) -> None:
        self._work.error = reason
        if self._service.abandon():
            self._settle(Status.FAILED)

    def _settle_if_arrived(self) -> bool:
        """An engine may die with nothing left to do, or while its last call is answered here."""
        if not (self._work.busy and self._has_arrived()):
            return False
        self._work.error = None
        self._completed()
        self._settle(Status.COMPLETED)
        return True

    def _resume_guest(self) -> None:
        try:
            self._guest.resume()
        except PostcopyError as error:
            self._shown.error = f"{self._shown.error}; and the guest cannot go on: {error}"

    def _tell(self, job: Job, status: Status) -> None:
        if job is self._shown and self._settings.enabled(Capability.EVENTS):
            self._events.emit("MIGRATION", {"status": status.value})
