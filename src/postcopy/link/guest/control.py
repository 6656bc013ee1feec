"""The migration subsystem of one guest's process: what its monitor drives.

It checks what may be asked when, starts an engine for each migration, mirrors the engine's status, and
decides what an engine's death means.  The figures are the engine's; it is asked for them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from postcopy.channel.address import parse
from postcopy.channel.descriptor_check import Use, descriptors_for
from postcopy.errors import EngineDied, PostcopyError, Reason, WrongState
from postcopy.events import EventBus
from postcopy.link.guest.engine_process import EnginePool, EngineProcess
from postcopy.link.guest.engine_slot import EngineSlot
from postcopy.link.guest.job import Current, Job
from postcopy.link.guest.keeper import GuestKeeper, OwnedGuest
from postcopy.link.guest.outcome import Outcome, Reports
from postcopy.link.guest.paused import Paused
from postcopy.link.guest.preflight import check_movable
from postcopy.link.guest.queued_migration import QueuedMigration
from postcopy.link.guest.resetting import Resetting
from postcopy.link.guest.settings import Settings, change_all
from postcopy.link.guest.watchdog import HANG_LOOKS
from postcopy.link.protocol import (
    EngineReports,
    IncomingCommands,
    JobCommands,
    OutgoingCommands,
    RestoreCommands,
)
from postcopy.link.rpc import Handler, Link, handlers
from postcopy.link.values import sent
from postcopy.ownership import Move
from postcopy.parameters import NO_OVERRIDES, Capabilities, Capability, Overrides, Parameters
from postcopy.statistics import MigrationInfo
from postcopy.status import GIVEN_UP, Progress, Status
from postcopy.trace import trace

_LAST_WORDS_S = 3.0  # an engine may need some of them, see `postcopy.engine.service`


class MigrationControl:
    """Both directions of one guest; any thread may call any method.

    :param incoming: this process waits for a guest to come.
    :param on_moved: called when the guest has moved away for good.
    :param on_incoming_failed: called with the reason when no guest will come.
    :param engines: where engines come from, ours from now on.
    :param hang_looks: when one hangs: see :mod:`postcopy.link.guest.watchdog`.
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
        hang_looks: int = HANG_LOOKS,
    ) -> None:
        self._guest = guest
        self._ownership = guest.ownership
        self._events = events
        self._pool = pool = engines or EnginePool()
        self._engines = EngineSlot(
            self._handlers, self._engine_ended, pool, hang_looks, self._may_call_engine
        )
        self.settings = Settings()  # of jobs that are still to come
        self._keeper = GuestKeeper(guest, self._engines.share)
        self._current = Current(Job(self._tell, incoming=incoming), incoming)
        self._outcome = Outcome(
            guest,
            self._keeper,
            self._engines,
            self._current,
            on_moved,
            on_incoming_failed,
        )
        self._recovery = self._outcome.recovery
        self._restoring = self._outcome.restoring
        self._lock = self._current.lock
        self._check_movable = partial(check_movable, guest, self._keeper)
        self._queued = QueuedMigration(
            self._lock, self._restoring, self._engines, self._begin, self._begin_move
        )
        self._paused = Paused(guest, self._keeper, self._engines, self._outcome, self._queued)
        check, complete = self._check_can_start, self._restoring.complete_first
        self.resetting = Resetting(guest, self._keeper, pool, self._lock, check, complete)

    def prepare(self) -> None:
        """Start what takes time: an engine, and for a destination its memory."""
        self._engines.prepare()
        self._keeper.prepare()
        if self._current.awaits:
            with suppress(EngineDied):  # 'incoming' starts another
                self._engines.start().call(IncomingCommands.prepare_destination)

    def close(self) -> None:
        """End whatever is going on; the process is leaving.

        Orders that wait, for an engine or for the end of a restore, fail; they hold the locks meanwhile.
        """
        self._engines.close()
        self._restoring.close()
        self.resetting.close()
        self._keeper.unwatch_snapshot()  # no vCPU is left waiting for an engine that is gone

    def kill_engines(self) -> None:
        """End the engines that hang, after :meth:`close`: a stopped process would stay for good."""
        self._pool.kill_left(_LAST_WORDS_S)

    # --- settings

    @property
    def capabilities(self) -> Capabilities:
        """What is on."""
        return self.settings.capabilities

    @property
    def parameters(self) -> Parameters:
        """What is set."""
        return self.settings.parameters

    def set_capabilities(self, changes: Mapping[Capability, bool]) -> None:
        """Switch capabilities, all of them or none."""
        with self._lock:
            self._check_not_expecting()
            # A destination that waits may still be told; QEMU refuses some by name then.
            job = self._current.shown
            waits = self._current.awaits and job.incoming and job.status is Status.SETUP
            if job.busy and not (waits or job is self._restoring.job):
                raise WrongState("There's a migration process in progress", Reason.BUSY)
            started = self._current.listening and self._restoring.job is None
            change_all(
                (job, self) if job.busy else (self,),
                lambda settings: settings.switched(
                    changes,
                    awaits=self._current.awaits,
                    incoming_started=started,
                    running=self._guest.running,
                ),
            )
            if self._current.listening:
                # A note, not a call: the engine may have something to tell that needs this lock.
                self._engines.tell(JobCommands.set_capabilities, job.settings.capabilities)

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Set parameters by QEMU's names; a migration under way takes them over."""
        with self._lock:
            self._check_not_expecting()
            work = self._outcome.work
            jobs = [job for job in {self._current.shown, work} if job.busy]
            change_all((self, *jobs), lambda settings: settings.set(changes))
            if work.busy:
                self._engines.tell(JobCommands.set_parameters, work.settings.parameters)

    def _check_not_expecting(self) -> None:
        if self._current.expecting:  # its engine has been told what is set
            raise WrongState("an incoming migration is just being started; try again")

    # --- orders

    def migrate(
        self, uri: str, *, resume: bool = False, overrides: Overrides = NO_OVERRIDES
    ) -> None:
        """Begin to send the guest to ``uri``."""
        if resume:
            self._paused.resume(uri, overrides)
            return
        with descriptors_for(parse(uri), Use.SEND) as fds:  # refused before anything moves
            with self._lock:
                self._check_can_start()
                running = self._guest.running
                settings = self.settings.for_migrate(overrides, parse(uri), running=running)
                after = self._restoring.job
                self._current.uri = uri
                job = Job(self._tell, incoming=False, settings=settings, after=after)
                self._ownership.ordered(job.order, "outgoing", uri)
                self._current.shown = job
                if after is not None:
                    self._queued.take(job, uri, fds)
                    return
                self._begin_move(job)
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
            settings, order = job.settings, OutgoingCommands.start_source
            link.call(order, uri, settings.capabilities, settings.parameters, sent(fds))
        except EngineDied:
            link.wait_over()
        except PostcopyError as error:
            self._not_begun(job, error)
            raise

    def _not_begun(self, job: Job, error: PostcopyError) -> None:
        """What was ordered has failed before anything of it was done to the guest."""
        with self._lock:
            if self._outcome.work is job and job.busy:
                job.error = str(error)
                self._outcome.settle(Status.FAILED)

    def incoming(
        self, uri: str, *, exit_on_error: bool = True, overrides: Overrides = NO_OVERRIDES
    ) -> None:
        """Listen for a guest."""
        address = parse(uri)
        with self._expecting(exit_on_error, "migrate-incoming", uri) as link:
            settings = self.settings.for_incoming(overrides, address)
            job = Job(self._tell, incoming=True, settings=settings)
            with descriptors_for(address, Use.RECEIVE) as fds:
                order = IncomingCommands.listen
                found = link.call(order, uri, settings.capabilities, settings.parameters, sent(fds))
            job.addresses = tuple(found)
            with self._lock:
                self._begin_incoming(job, link)
                self._recovery.listens_at(uri)
        link.note(IncomingCommands.accept)

    def _begin_move(self, job: Job) -> None:
        """An outgoing order begins; under the lock.

        :raises WrongState: the guest is not here, not whole, or has a reset point.
        """
        self._check_movable()
        if not job.is_snapshot:
            self._ownership.move(Move.ORDER)

    @contextmanager
    def _expecting(self, exit_on_error: bool, name: str, uri: str) -> Iterator[Link]:  # noqa: FBT001 - as QMP names it
        """The engine that is to be told of the guest that comes.

        Not under the lock: the engine may look a name up, or read an image, and what it says meanwhile is
        taken under the lock.
        """
        with self._lock:
            self._check_expects()
            self._current.expecting = True
        try:
            with self._lock:
                link = self._expect(exit_on_error, name, uri)
            try:
                yield link
            except EngineDied:
                link.wait_over()  # until then the next order would be given to the dead engine
                raise
        finally:
            with self._lock:
                self._current.expecting = False

    def _check_expects(self) -> None:
        if not self._current.awaits:
            raise WrongState("'-incoming' was not specified on the command line")
        if self._current.listening or self._current.expecting:
            raise WrongState("The incoming migration has already been started")

    def _expect(self, exit_on_error: bool, name: str, uri: str) -> Link:  # noqa: FBT001 - as QMP names it
        self._current.exit_on_error = exit_on_error
        self._ownership.move(Move.AWAIT)
        self._ownership.ordered(name, "incoming", uri)
        link = self._engines.link
        if link is None or self._current.shown.status is not Status.NONE:
            link = self._engines.start()
        return link

    def _begin_incoming(self, job: Job, link: Link) -> None:
        if self._engines.link is not link:
            raise EngineDied("the engine process died; give the order again")
        self._current.shown = job
        self._current.listening = True
        job.progress.move(Status.SETUP)

    def restore(self, path: str, *, exit_on_error: bool = True, **options: Any) -> None:
        """Wake the guest of an image: see :class:`postcopy.monitor.backend.MigrationControl`."""
        with self._expecting(exit_on_error, "restore", path) as link:
            job = Job(self._tell, incoming=True, settings=self.settings)
            opened = self._restoring.open(job, link, path, **options)
            with self._lock:
                self._begin_incoming(job, link)
                self._restoring.begin(job, opened)
        link.note(RestoreCommands.restore)

    def start_postcopy(self) -> None:
        """Switch over as soon as possible."""
        job = self._current.shown
        planned = {job.settings} if job.busy else {job.settings, self.settings}
        if not any(each.enabled(Capability.POSTCOPY_RAM) for each in planned):
            raise WrongState(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        if self._current.shown.status is Status.NONE:
            raise WrongState("Postcopy must be started after migration has been started")
        if self._queued.start_postcopy():
            return
        if self._current.shown.busy and not self._current.shown.incoming:
            self._engines.tell(OutgoingCommands.start_postcopy)

    def cancel(self) -> None:
        """Give up the outgoing migration."""
        if self._queued.cancel() or self._current.shown.incoming or not self._current.shown.busy:
            return
        if self._current.shown.status in GIVEN_UP:
            raise WrongState("Postcopy migration in progress, cannot cancel.")
        # From here on no engine can hand the guest over; if one was quicker, this is refused.
        try:
            self._ownership.move(Move.CANCEL)
        except WrongState:
            if self._engines.call(OutgoingCommands.end_command):
                return  # what the command has done is not known: the guest waits for 'cont'
            raise
        self._engines.tell(OutgoingCommands.cancel)

    def continue_(self, state: Status) -> None:
        """Leave ``pre-switchover``."""
        if self._current.shown.status is not state:
            raise WrongState(f"Migration not in expected state: {self._current.shown.status.value}")
        self._engines.tell(OutgoingCommands.proceed)

    def pause(self) -> None:
        """Break a postcopy on purpose."""
        self._paused.pause()

    def recover(self, uri: str) -> None:
        """Listen anew for the source of a paused postcopy."""
        self._paused.recover(uri)

    def lost(self) -> None:
        """Give up on the source of a paused postcopy, as the parameter ``x-on-loss`` says."""
        self._paused.lost()

    def arrived(self) -> None:
        """The destination has been seen to complete: nothing here is needed any more."""
        self._paused.arrived()

    def info(self) -> MigrationInfo:
        """How it stands: the engine's figures as of now, or the last it gave."""
        job, link = self._current.shown, self._engines.link
        if job is self._outcome.work and link is not None:
            job.ask(link, self._lock)
        return job.info()

    # --- the engine

    def _may_call_engine(self) -> bool:
        return not self._lock.is_held  # what it says before it answers is taken under the lock

    @property
    def progress(self) -> Progress:
        """Where that stands which was ordered last."""
        return self._current.shown.progress

    def _check_can_start(self) -> None:
        job = self._current.shown
        if job.status is Status.POSTCOPY_PAUSED and self._guest.owned and not job.incoming:
            self._outcome.settle(Status.FAILED)  # 'cont' has taken the guest back
        self._restoring.refuse_to_leave()
        if job.status is Status.POSTCOPY_PAUSED:
            raise WrongState("Can't migrate the vm that was paused due to previous migration")
        if job.busy and job is not self._restoring.job:
            raise WrongState("There's a migration process in progress", Reason.BUSY)
        self._check_movable()  # again when it begins: here, so that an order that waits is refused at once

    @property
    def _engine(self) -> EngineProcess | None:
        return self._engines.current

    def _engine_ended(self, engine: EngineProcess) -> None:
        self._outcome.engine_ended(engine)

    def _handlers(self, engine: EngineProcess) -> dict[str, Handler]:
        return self._keeper.handlers() | handlers(
            EngineReports, Reports(engine, self._outcome, self._on_pass)
        )

    def _tell(self, job: Job, status: Status) -> None:
        direction = "incoming" if job.incoming else "outgoing"
        trace("guest.status", status=status.value, direction=direction)
        if job is self._current.shown and job.settings.enabled(Capability.EVENTS):
            self._events.emit("MIGRATION", {"status": status.value})

    def _on_pass(self, number: int) -> None:
        """A source begins to go over all memory; on the link's reader thread."""
        if self._outcome.work.settings.enabled(Capability.EVENTS):
            self._events.emit("MIGRATION_PASS", {"pass": number})
