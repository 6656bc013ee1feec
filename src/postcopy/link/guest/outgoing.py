"""A guest that leaves: by migration, or into an image while it runs on.

A guest that is still being restored leaves when it is whole.  Its order is taken at once, and can be
watched and cancelled like every other; the restore goes on behind it at full speed, and at its own pace
again when the order is given up.
"""

import os
import socket
import stat
import threading
from collections.abc import Sequence
from dataclasses import fields, replace

from postcopy.channel.address import FdAddress, TcpAddress, UnixAddress, parse
from postcopy.channel.descriptor_check import Use, descriptors_for
from postcopy.channel.partial_file import remove_partial
from postcopy.errors import EngineDied, HostCannot, PostcopyError, Refused, WrongState
from postcopy.kernel import threads
from postcopy.kernel.calls import close_all, open_all
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.job import Job, MigrationState, check_host
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.link.guest.owned_guest import OwnedGuest
from postcopy.link.guest.restoring import IncomingRestore
from postcopy.link.protocol import JobCommands, OutgoingCommands
from postcopy.link.rpc import Link
from postcopy.link.values import sent
from postcopy.ownership import Move, Owner
from postcopy.parameters import Capability, Overrides, Settings
from postcopy.statistics import Measured, MigrationInfo
from postcopy.status import ENDED, GIVEN_UP, Status

_WOKEN = frozenset({*ENDED, Status.POSTCOPY_PAUSED})


class OutgoingJob(Job):
    """What a migration and a snapshot have in common.

    Invariant, under the lock: while it waits for a restore, its status is ``setup``.

    :param uri: where the guest, or the image, goes.
    """

    order = "migrate"
    """What the user has ordered."""

    def __init__(self, state: MigrationState, settings: Settings, uri: str = "") -> None:
        super().__init__(state, settings)
        self._uri = uri
        self._restore = state.restore
        # Under the lock: whether it waits for that, and whether a user has asked for postcopy meanwhile.
        self._is_queued = False
        self._postcopy_wanted = False

    def prepare(self, fds: Sequence[int]) -> Link | None:
        """Take the guest, and an engine to send it, or wait for the guest to be whole; under the lock.

        :param fds: the descriptor that the address means, if it means one.
        :return: the engine to :meth:`start` with; None: that is left to a thread.
        :raises PostcopyError: the order has failed.
        """
        if self._restore is not None:
            self._queue(self._restore, open_all(os.dup, fds))
            return None
        self.take_guest()
        self.progress.move(Status.SETUP)
        try:
            return self.state.engines.start()
        except PostcopyError as error:
            self._not_begun(error)
            raise

    def take_guest(self) -> None:
        """It begins; under the lock.

        :raises WrongState: the guest is not here, not whole, or has a reset point.
        """
        check_movable(self.state.guest, self.state.keeper)

    def start(self, link: Link, fds: Sequence[int]) -> None:
        """Have the engine begin.

        :raises PostcopyError: it cannot, and the job has failed; silently nothing when it has died:
            the end of the link has been dealt with, as the status says.
        """
        try:
            link.call(OutgoingCommands.start_source, self._uri, self.settings, sent(fds))
        except EngineDied:
            link.wait_over()
        except PostcopyError as error:
            self._not_begun(error)
            raise

    def _not_begun(self, error: PostcopyError) -> None:
        """It has failed before anything of it was done to the guest."""
        with self.state.lock:
            if self.state.work is self and self.busy:
                self.error = str(error)
                self.settle(Status.FAILED)

    def info(self) -> MigrationInfo:
        found = super().info()
        if self._restore is None:
            return found
        return replace(found, measured=_merged(found.measured, self._restore.info().measured))

    # --- while the guest is not whole

    def _queue(self, restore: IncomingRestore, fds: Sequence[int]) -> None:
        """Wait for it; a thread of its own does.

        :raises HostCannot: there can be no more threads, and the order has failed.
        """
        arguments = (restore, fds)
        thread = threading.Thread(target=self._start_when_whole, args=arguments, name="departing")
        thread.daemon = True
        self._is_queued = True
        self.progress.move(Status.SETUP)
        restore.hurry()
        try:
            threads.start(thread)
        except HostCannot as error:
            close_all(fds)
            self.refuse_queued(str(error))
            raise

    def _start_when_whole(self, restore: IncomingRestore, fds: Sequence[int]) -> None:
        try:
            restore.progress.wait(*_WOKEN)
            with self.state.lock:
                if not self._is_queued:
                    return
                restore.check_leaves()
                link = self.state.engines.start()
                self.take_guest()
                self._is_queued = False
            self.start(link, fds)
            if self._postcopy_wanted:
                link.note(OutgoingCommands.start_postcopy)
        except PostcopyError as error:
            self.refuse_queued(str(error))  # nothing more to say of a job that has begun
        finally:
            close_all(fds)

    def refuse_queued(self, reason: str) -> None:
        with self.state.lock:
            if self._is_queued:
                self.error = reason
                self._leave_queue(Status.FAILED)

    def _leave_queue(self, status: Status) -> None:
        self._is_queued = False
        self.progress.move(status)
        assert self._restore is not None
        self._restore.hurry(wanted=False)

    # --- orders

    def start_postcopy(self) -> None:
        with self.state.lock:
            self._postcopy_wanted = True
            if self._is_queued:
                return
        if self.busy:
            self.state.engines.tell(OutgoingCommands.start_postcopy)

    def cancel(self) -> None:
        state = self.state
        with state.lock:
            if self._is_queued:
                self.progress.move(Status.CANCELLING)
                self._leave_queue(Status.CANCELLED)
        if not self.busy:
            return
        if self.status in GIVEN_UP:
            raise WrongState("Postcopy migration in progress, cannot cancel.")
        # From here on no engine can hand the guest over; if one was quicker, this is refused.
        try:
            state.ownership.move(Move.CANCEL)
        except WrongState:
            if self._end_command():
                return  # what the command has done is not known: the guest waits for 'cont'
            raise
        state.engines.tell(OutgoingCommands.cancel)

    def _end_command(self) -> bool:
        """End a command that goes on behind the end of its stream; return whether there was one."""
        try:
            return self.state.engines.call(OutgoingCommands.end_command)
        except EngineDied:
            return True  # the command's end was that of the migration: its engine went before it answered


class OutgoingSnapshot(OutgoingJob):
    """The guest stays, and an image of it leaves."""

    order = "snapshot"

    def let_go(self, engine: EngineProcess) -> None:
        self.state.keeper.unwatch_snapshot()
        engine.kill()  # its link goes first, and then the claim on what it was writing
        remove_partial(parse(self._uri))  # no half image is left behind
        self.resume_guest()


class OutgoingMigration(OutgoingJob):
    """The guest leaves, and may come back only as the table of owners says."""

    def __init__(self, state: MigrationState, settings: Settings, uri: str = "") -> None:
        super().__init__(state, settings, uri)
        self._resuming = threading.Lock()  # held while its engine is told to go on

    def take_guest(self) -> None:
        super().take_guest()
        self.state.ownership.move(Move.ORDER)

    # --- what its engine says, and its end

    def works(self) -> None:
        self.state.ownership.try_move(Move.TAKEN)  # its engine serves pages already
        super().works()

    def completed(self) -> None:
        self.state.ownership.try_move(Move.MOVED)  # what was saved stays saved
        self.state.on_moved()

    def has_arrived(self) -> bool:
        return self.status in GIVEN_UP and self.state.ownership.owner is Owner.MOVED

    def engine_lost(self, engine: EngineProcess) -> None:
        if self.status in GIVEN_UP:
            self.pause_for(engine)
        else:
            super().engine_lost(engine)

    def let_go(self, engine: EngineProcess) -> None:
        self.state.keeper.unwatch_writes()
        if self.state.guest.owned:
            self.state.ownership.try_move(Move.END)
            self.resume_guest()
        else:
            self.state.ownership.try_move(Move.LOSE_TOUCH)
            self.error = (
                f"the engine process {engine.fate} while handing the guest over; the destination may be "
                "running it, so it stays stopped here: 'cont' takes it back"
            )

    # --- orders about a broken postcopy

    def pause(self) -> None:
        # One whose destination does not answer waits for it in `postcopy-device`, perhaps for ever, and one
        # that cannot connect again in `postcopy-recover-setup`.
        if self.status in {Status.POSTCOPY_DEVICE, Status.POSTCOPY_RECOVER_SETUP}:
            self.state.engines.tell(JobCommands.pause)
        else:
            super().pause()

    def resume(self, uri: str, overrides: Overrides) -> None:
        if overrides:
            raise Refused(
                "'resume' goes on with what the migration began with; leave x-capabilities and "
                "x-parameters out ('migrate-set-parameters' reaches a paused migration)"
            )
        self.check_address(uri)
        ownership = self.state.ownership
        with self._resuming:
            if self.status is not Status.POSTCOPY_PAUSED:
                super().resume(uri, overrides)
            ownership.check(Move.RESUME)
            ownership.ordered("migrate-resume", "outgoing", uri)
            try:
                self._go_on(uri)
            except PostcopyError:
                ownership.try_move(Move.LOSE_TOUCH)
                raise

    def _go_on(self, uri: str) -> None:
        """By the engine that has paused, or by one in place of a dead one, which may still look alive."""
        engines = self.state.engines
        with descriptors_for(parse(uri), Use.SEND) as fds:
            try:
                self._begin_recovery(uri, fds)
            except EngineDied:
                # Nothing has been said to the destination: that comes with the order below.
                self.check_paused()
                engines.adopt(OutgoingCommands.adopt_source, self.settings)
                self._begin_recovery(uri, fds)
        engines.tell(OutgoingCommands.go_on)

    def _begin_recovery(self, uri: str, fds: Sequence[int]) -> None:
        # From here until it has failed again 'cont' cannot take it back.
        self.state.ownership.move(Move.RESUME)
        self.state.engines.call(OutgoingCommands.resume_source, uri, sent(fds))

    def arrived(self) -> None:
        state, ownership = self.state, self.state.ownership
        with self._resuming, state.lock:
            if ownership.owner not in {Owner.UNKNOWN, Owner.TAKEN} or self.status not in {
                Status.POSTCOPY_PAUSED,
                Status.FAILED,
            }:
                super().arrived()
            ownership.move(Move.MOVED)
            state.keeper.unwatch_writes()
            if not self.settle_if_arrived():
                state.on_moved()


def check_movable(guest: OwnedGuest, keeper: GuestKeeper) -> None:
    """Refuse to send, or to save, what is not here, not whole, or is to be reset some day.

    :raises WrongState: it is so.
    """
    guest.ownership.check(Move.ORDER)
    if any(keeper.lost.values()):
        raise WrongState("pages of this guest are lost, so it cannot move; start it anew")
    if keeper.reset_point:
        raise WrongState(
            "the guest has a reset point, whose tracking of writes excludes migrations and snapshots; "
            "end it first (x-reset-end, or 'postcopy reset --end')"
        )


def check_logged(guest: OwnedGuest) -> None:
    """Refuse to follow what is written to memory that others write without a log.

    :raises WrongState: one does.
    """
    silent = [process.name for process in guest.shared_with() if not process.logs_writes]
    if silent:
        raise WrongState(
            f"the guest's memory is shared with {', '.join(silent)}, which cannot log what it writes, so "
            "the guest can neither be migrated nor have a reset point; detach that first, or take a "
            "background snapshot"
        )


def outgoing(
    state: MigrationState, settings: Settings, overrides: Overrides, uri: str
) -> OutgoingJob:
    """What an order to send the guest begins; what it cannot do is refused before anything moves.

    :param settings: what is set in this process; ``overrides`` are the order's own.
    :raises Refused: they do not go together, or not with the address; or a snapshot would go to what may
        run it, and the order does not say that it is one.
    :raises HostCannot: this host cannot do it.
    :raises WrongState: see :func:`check_logged`.
    """
    settings = settings.overridden(overrides)
    tls = state.objects.tls(settings.parameters, incoming=False)
    settings = replace(settings, tls=tls)
    is_snapshot = settings.enabled(Capability.BACKGROUND_SNAPSHOT)
    job = (OutgoingSnapshot if is_snapshot else OutgoingMigration)(state, settings, uri)
    job.check_address(uri)
    check_host(settings.capabilities, state.guest, awaits=False)
    if not is_snapshot:
        check_logged(state.guest)
    if is_snapshot and not overrides.capabilities.get(Capability.BACKGROUND_SNAPSHOT):
        _check_sink(uri)
    return job


def _check_sink(uri: str) -> None:
    """Refuse a background snapshot to what may be another machine: its guest would run twice.

    QEMU sends it, and its destination runs the guest.

    :raises Refused: something listens there.
    """
    address = parse(uri)
    if isinstance(address, TcpAddress | UnixAddress) or (
        isinstance(address, FdAddress) and _has_named_peer(address.number)
    ):
        raise Refused(
            f"capability background-snapshot is on, so the guest would go on here, and what listens at "
            f"{address} may run it too; switch it off to migrate, or order a snapshot (x-snapshot)"
        )


def _has_named_peer(fd: int) -> bool:
    """Whether a descriptor is a socket whose other end was reached by its name."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as connection:
        try:
            return bool(connection.getpeername())
        except OSError:
            return False  # its peer has gone


def _merged(measured: Measured | None, before: Measured | None) -> Measured | None:
    """What was measured, and where nothing was, what had been before."""
    if measured is None or before is None:
        return measured or before
    names = [each.name for each in fields(Measured)]
    empty = {name: getattr(before, name) for name in names if getattr(measured, name) in {None, ()}}
    return replace(measured, **empty)
