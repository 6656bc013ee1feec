"""The migration subsystem of one guest's process: what its monitor drives.

It checks what may be asked when, and hands each order to the job that it is about: see
:mod:`postcopy.link.guest.job`.  What an engine says, and its end, go to the job that it works for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from postcopy.channel.address import parse
from postcopy.channel.descriptor_check import Use, descriptors_for
from postcopy.errors import EngineDied, PostcopyError, WrongState
from postcopy.events import EventBus
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.engine_slot import EnginePool, EngineSlot
from postcopy.link.guest.incoming import IncomingJob, IncomingMigration
from postcopy.link.guest.job import Job, MigrationState, check_host, refuse_busy
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.link.guest.memory_maps import MemoryMaps
from postcopy.link.guest.outgoing import OutgoingMigration, check_movable, outgoing
from postcopy.link.guest.owned_guest import OwnedGuest
from postcopy.link.guest.resetting import Resetting
from postcopy.link.guest.restoring import IncomingRestore
from postcopy.link.guest.watchdog import HANG_LOOKS
from postcopy.link.protocol import EngineReports, IncomingCommands, JobCommands, OutgoingCommands
from postcopy.link.rpc import Handler, Link, handlers
from postcopy.ownership import Move
from postcopy.parameters import (
    NO_OVERRIDES,
    Capabilities,
    Capability,
    Overrides,
    Parameters,
    Settings,
)
from postcopy.restore_options import RestoreOptions
from postcopy.statistics import MemoryMap, MigrationInfo
from postcopy.status import Status, StatusMachine
from postcopy.trace import trace

_LAST_WORDS_S = 3.0  # an engine may need some of them, see `postcopy.engine.engine`


class MigrationControl:
    """Both directions of one guest; any thread may call any method.

    What has no docstring here is a method of :class:`postcopy.monitor.controls.MigrationControl`.

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
        self._events = events
        self._pool = pool = engines or EnginePool()
        self.settings = Settings()  # of jobs that are still to come
        self._engines = EngineSlot(
            self._handlers, self._engine_ended, pool, hang_looks, self._may_call_engine
        )
        self._keeper = GuestKeeper(guest, self._engines.share)
        self._state = state = MigrationState(
            guest,
            self._keeper,
            self._engines,
            self._tell,
            on_moved,
            on_incoming_failed,
            incoming,
        )
        self._lock = state.lock
        self._maps = MemoryMaps(state)
        self.objects = state.objects
        state.shown = (IncomingMigration if incoming else OutgoingMigration)(state, self.settings)
        self._keeper.arrived = self._guest_arrived
        check, complete = self._check_can_start, self._complete_restore
        self.resetting = Resetting(guest, self._keeper, pool, self._lock, check, complete)

    def _guest_arrived(self) -> None:
        if isinstance(job := self._state.work, IncomingJob):
            job.guest_arrived()

    def prepare(self) -> None:
        """Start what takes time: an engine, and for a destination its memory."""
        self._engines.prepare()
        self._keeper.prepare()
        if self._state.awaits:
            with suppress(EngineDied):  # 'incoming' starts another
                self._engines.start().call(IncomingCommands.prepare_destination)

    def close(self) -> None:
        """End whatever is going on; the process is leaving.

        Orders that wait, for an engine or for the end of a restore, fail; they hold the locks meanwhile.
        """
        self._engines.close()
        self._state.closed = True
        self.resetting.close()
        self._keeper.unwatch_snapshot()  # no vCPU is left waiting for an engine that is gone

    def kill_engines(self) -> None:
        """End the engines that hang, after :meth:`close`: a stopped process would stay for good."""
        self._pool.kill_left(_LAST_WORDS_S)

    # --- settings

    @property
    def capabilities(self) -> Capabilities:
        return self.settings.capabilities

    @property
    def parameters(self) -> Parameters:
        return self.settings.parameters

    def set_capabilities(self, changes: Mapping[Capability, bool]) -> None:
        state = self._state
        with self._lock:
            self._check_not_expecting()
            # A destination that waits may still be told; QEMU refuses some by name then.
            job = state.shown
            waits = state.awaits and job.incoming and job.status is Status.SETUP
            if job.busy and not (waits or job is state.restore):
                refuse_busy()
            started = state.listening and state.restore is None

            def switched(before: Settings) -> Settings:
                changed = before.capabilities.with_changes(changes, incoming_started=started)
                check_host(changed, self._guest, awaits=state.awaits)
                return replace(before, capabilities=changed).checked()

            _change_all([job, self] if job.busy else [self], switched)
            if state.listening:
                # A note, not a call: the engine may have something to tell that needs this lock.
                self._engines.tell(JobCommands.set_capabilities, job.settings.capabilities)

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        with self._lock:
            self._check_not_expecting()
            shown, work = self._state.shown, self._state.work
            jobs = [job for job in {shown, work} if job.busy]
            _change_all([self, *jobs], lambda before: before.overridden(Overrides({}, changes)))
            if work.busy:
                self._engines.tell(JobCommands.set_parameters, work.settings.parameters)

    def _check_not_expecting(self) -> None:
        if self._state.expecting:  # its engine has been told what is set
            raise WrongState("an incoming migration is just being started; try again")

    # --- a guest that leaves

    def migrate(
        self, uri: str, *, resume: bool = False, overrides: Overrides = NO_OVERRIDES
    ) -> None:
        if resume:
            self._state.shown.resume(uri, overrides)
            return
        with descriptors_for(parse(uri), Use.SEND) as fds:  # refused before anything moves
            with self._lock:
                self._check_can_start()
                job = outgoing(self._state, self.settings, overrides, uri)
                self._state.ownership.ordered(job.order, "outgoing", uri)
                self._state.shown = job
                link = job.prepare(fds)
            if link is not None:
                job.start(link, fds)

    def _check_can_start(self) -> None:
        job, restore = self._state.shown, self._state.restore
        if job.status is Status.POSTCOPY_PAUSED and self._guest.owned and not job.incoming:
            job.settle(Status.FAILED)  # 'cont' has taken the guest back
        if restore is not None:
            restore.check_leaves()
        if job.status is Status.POSTCOPY_PAUSED:
            raise WrongState("Can't migrate the vm that was paused due to previous migration")
        if job.busy and job is not restore:
            refuse_busy()
        # Again when it begins: here, so that an order that waits is refused at once.
        check_movable(self._guest, self._keeper)

    def start_postcopy(self) -> None:
        job = self._state.shown
        planned = {job.settings} if job.busy else {job.settings, self.settings}
        if not any(each.enabled(Capability.POSTCOPY_RAM) for each in planned):
            raise WrongState(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        if job.status is Status.NONE:
            raise WrongState("Postcopy must be started after migration has been started")
        job.start_postcopy()

    def cancel(self) -> None:
        self._state.shown.cancel()

    def continue_(self, state: Status) -> None:
        if self._state.shown.status is not state:
            raise WrongState(f"Migration not in expected state: {self._state.shown.status.value}")
        self._engines.tell(OutgoingCommands.proceed)

    def arrived(self) -> None:
        self._state.shown.arrived()

    # --- a guest that comes

    def incoming(
        self, uri: str, *, exit_on_error: bool = True, overrides: Overrides = NO_OVERRIDES
    ) -> None:
        parse(uri)  # refused before anything is done
        with self._expecting(exit_on_error, "migrate-incoming", uri) as link:
            settings = self.settings.overridden(overrides)
            tls = self.objects.tls(settings.parameters, incoming=True)
            job = IncomingMigration(self._state, replace(settings, tls=tls), uri)
            check_host(job.settings.capabilities, self._guest, awaits=True)
            job.check_address(uri)
            self._begin(job, link)

    def restore(self, options: RestoreOptions, *, exit_on_error: bool = True) -> None:
        with self._expecting(exit_on_error, "restore", options.path) as link:
            self._begin(IncomingRestore(self._state, self.settings, options), link)

    @contextmanager
    def _expecting(self, exit_on_error: bool, name: str, uri: str) -> Iterator[Link]:  # noqa: FBT001 - as QMP names it
        """The engine that is to be told of the guest that comes.

        Not under the lock: the engine may look a name up, or read an image, and what it says meanwhile is
        taken under the lock.
        """
        state = self._state
        with self._lock:
            if not state.awaits:
                raise WrongState("'-incoming' was not specified on the command line")
            if state.listening or state.expecting:
                raise WrongState("The incoming migration has already been started")
            state.expecting = True
        try:
            with self._lock:
                state.exit_on_error = exit_on_error
                state.ownership.move(Move.AWAIT)
                state.ownership.ordered(name, "incoming", uri)
                link = self._engines.link
                if link is None or state.shown.status is not Status.NONE:
                    link = self._engines.start()
            try:
                yield link
            except EngineDied:
                link.wait_over()  # until then the next order would be given to the dead engine
                raise
        finally:
            with self._lock:
                state.expecting = False

    def _begin(self, job: IncomingJob, link: Link) -> None:
        job.prepare(link)
        with self._lock:
            job.begin(link)
        job.start(link)

    def recover(self, uri: str) -> None:
        self._show_paused_restore()
        self._state.shown.recover(uri)

    def lost(self) -> None:
        self._show_paused_restore()
        with suppress(PostcopyError):
            self._maps.look()  # what is missing now: nothing tells of it afterwards
        self._state.shown.lost()

    def _show_paused_restore(self) -> None:
        """Show the paused restore again, in place of a migration that waited for it."""
        state = self._state
        with self._lock:
            if state.restore is not None and state.restore.status is Status.POSTCOPY_PAUSED:
                state.shown.refuse_queued("the guest's restore is paused")
                state.shown = state.restore

    def _complete_restore(self) -> None:
        restore = self._state.restore
        if restore is not None:
            restore.complete_first()

    # --- in either direction

    def pause(self) -> None:
        self._state.work.pause()

    @property
    def engine_restarts(self) -> int:
        return self._engines.restarts

    def info(self) -> MigrationInfo:
        job = self._state.shown
        if job is self._state.work:
            job.ask()
        return job.info()

    def memory_map(self) -> MemoryMap:
        return self._maps.look()

    @property
    def progress(self) -> StatusMachine:
        """Where that stands which was ordered last."""
        return self._state.shown.progress

    def _tell(self, job: Job, status: Status) -> None:
        direction = "incoming" if job.incoming else "outgoing"
        trace("guest.status", status=status.value, direction=direction)
        if job is self._state.shown and job.settings.enabled(Capability.EVENTS):
            self._events.emit("MIGRATION", {"status": status.value})

    # --- the engine

    @property
    def _engine(self) -> EngineProcess | None:
        return self._engines.current

    def _may_call_engine(self) -> bool:
        return not self._lock.is_held  # what it says before it answers is taken under the lock

    def _handlers(self, engine: EngineProcess) -> dict[str, Handler]:
        reports = _Reports(engine, self._state, self._events)
        return self._keeper.handlers() | handlers(EngineReports, reports)

    def _engine_ended(self, engine: EngineProcess) -> None:
        """The link is gone: nothing new if we ended it, or if it had finished.

        Under the lock: what is just being ordered of it has been noted then.
        """
        trace("guest.engine-ended", engine=engine.process_id)
        with self._lock:
            if self._engines.current is engine:
                self._keeper.run_freely()
                self._state.work.engine_died(engine)


class _Reports(EngineReports):
    """Takes what one engine tells of itself; on the link's reader thread."""

    def __init__(self, engine: EngineProcess, state: MigrationState, events: EventBus) -> None:
        self._engine = engine
        self._state = state
        self._events = events

    def status(self, status: Status, error: str | None, info: MigrationInfo) -> None:
        with self._state.lock:
            if self._state.engines.current is not self._engine:
                return  # given up, in the moment in which it had something to say
            job = self._state.work
            job.note(info, error)
            if status is Status.FAILED and job.outlives_failure():
                return
        job.on_status(status)

    def fault(self, reason: str) -> None:
        self._engine.fails(reason)

    def passed(self, number: int) -> None:
        if self._state.work.settings.enabled(Capability.EVENTS):
            self._events.emit("MIGRATION_PASS", {"pass": number})

    def progressed(self) -> None:
        if self._state.restore is not None:
            self._state.restore.supervisor.worked()


def _change_all(
    owners: Sequence[Job | MigrationControl], change: Callable[[Settings], Settings]
) -> None:
    """Change the settings of several owners, all of them or none.

    :raises PostcopyError: what ``change`` raises.
    """
    changed = [change(owner.settings) for owner in owners]
    for owner, settings in zip(owners, changed, strict=True):
        owner.settings = settings
