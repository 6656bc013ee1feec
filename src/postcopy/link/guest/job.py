"""What has been ordered of a guest: a job is one migration, snapshot or restore, from its order to its end.

A kind of job is a class (:mod:`outgoing`, :mod:`incoming`, :mod:`restoring`).  Each has the same methods:
what a user orders of it, what its engine says, and what the death of its engine means.  An order that does
not concern a kind is refused here, in QEMU's words, or does nothing.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from postcopy.abi.userfaultfd import Feature
from postcopy.channel.address import (
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
    check_tls_address,
    parse,
)
from postcopy.channel.descriptor_check import Use, answers, check_descriptor
from postcopy.errors import EngineDied, HostCannot, PostcopyError, Reason, Refused, WrongState
from postcopy.kernel.userfaultfd import MISSING_FEATURES, SNAPSHOT_FEATURES, Userfaultfd
from postcopy.link.guest.background_order import BackgroundOrder
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.engine_slot import AHEAD_S, EngineSlot
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.link.guest.owned_guest import OwnedGuest
from postcopy.link.guest.user_objects import UserObjects
from postcopy.link.protocol import JobCommands
from postcopy.ownership import Move, Owner, Ownership
from postcopy.parameters import Capabilities, Capability, Overrides, Settings
from postcopy.statistics import MigrationInfo
from postcopy.status import ENDED, GIVEN_UP, Status, StatusMachine

if TYPE_CHECKING:
    from postcopy.link.guest.restoring import IncomingRestore

_INFO_TIMEOUT_S = 5
_LAST_WORDS = ENDED - {Status.NONE}

_SPARE_DELAY_S = 2.0  # how long a guest that has just arrived has the CPUs to itself


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
class MigrationState:
    """One guest, and what is under way of it; changed under :attr:`lock`.

    :ivar tell: gets each change of a job's status.
    :ivar on_moved: called when the guest has moved away for good.
    :ivar on_incoming_failed: called with the reason when no guest will come.
    :ivar awaits: this process waits for a guest to come.
    :ivar shown: the job that was ordered last.
    :ivar restore: the one that is under way, whether the guest runs or not; a job that was ordered since
        waits for its end.
    :ivar expecting: an engine is being told where, or from which image, a guest comes.
    :ivar listening: and has been told.
    :ivar exit_on_error: the process ends when no guest comes.
    :ivar closed: the process is leaving.
    :ivar objects: that the user has made.
    :ivar lock: no engine is called under it, since what an engine says meanwhile is taken under it.
    """

    guest: OwnedGuest
    keeper: GuestKeeper
    engines: EngineSlot
    tell: Callable[["Job", Status], None]
    on_moved: Callable[[], None]
    on_incoming_failed: Callable[[str], None]
    awaits: bool
    shown: "Job" = field(init=False)
    restore: "IncomingRestore | None" = None
    expecting: bool = False
    listening: bool = False
    exit_on_error: bool = False
    closed: bool = False
    background: BackgroundOrder = field(default_factory=BackgroundOrder)
    objects: UserObjects = field(default_factory=UserObjects)
    lock: OrderLock = field(default_factory=OrderLock)

    @property
    def ownership(self) -> Ownership:
        """Whose the guest is."""
        return self.guest.ownership

    @property
    def work(self) -> "Job":
        """What the engine at work does: a restore may go on behind a migration that waits for it."""
        return self.restore or self.shown


class Job:
    """What there is to say of it, and what a user and an engine may do with it.

    :param settings: what it begins with; those of the process may change, and it keeps these.
    """

    incoming = False
    """The guest comes here."""

    def __init__(self, state: MigrationState, settings: Settings) -> None:
        self.state = state
        self.settings = settings
        self.error: str | None = None
        self.addresses: tuple[Mapping[str, Any], ...] = ()
        self.progress = StatusMachine(lambda status: state.tell(self, status))
        self._last = MigrationInfo(incoming=self.incoming)

    @property
    def status(self) -> Status:
        """Where it stands now."""
        return self.progress.status

    @property
    def busy(self) -> bool:
        """Whether it goes on still."""
        return self.status not in ENDED

    def check_address(self, uri: str) -> None:
        """Refuse an address that cannot do what the capabilities need.

        Two connections come where it can be reached more than once; pages have places in a file only; and
        what answers is a socket or a command.  See ``docs/transports.md``.

        :raises Refused: in QEMU's words, where QEMU does not find it out half-way.
        """
        address, settings = parse(uri), self.settings
        mapped, multifd = map(settings.enabled, (Capability.MAPPED_RAM, Capability.MULTIFD))
        if mapped and not isinstance(address, FileAddress):
            raise Refused("Migration requires seekable transport (e.g. file)")
        if mapped and multifd and settings.parameters.multifd_compression != "none":
            raise Refused("Cannot use compression with mapped-ram")
        several = multifd or settings.enabled(Capability.POSTCOPY_PREEMPT)
        opens_several = mapped or isinstance(address, TcpAddress | UnixAddress)
        if several and not opens_several:
            raise Refused("Migration requires multi-channel URIs (e.g. tcp)")
        zero_copy = settings.enabled(Capability.ZERO_COPY_SEND) and not self.incoming
        if zero_copy and not isinstance(address, TcpAddress):
            raise Refused(f"zero-copy-send needs tcp:, which {address} is not; switch it off")
        if isinstance(address, FdAddress):
            check_descriptor(address.number, Use.RECEIVE if self.incoming else Use.SEND)
        if settings.tls is not None:
            check_tls_address(settings.tls, address)
        if self.incoming or answers(address):
            return
        if settings.enabled(Capability.POSTCOPY_RAM):
            raise Refused(f"postcopy needs a channel that answers, which {address} does not")
        if settings.enabled(Capability.RETURN_PATH):
            raise Refused(
                f"return-path needs a channel that answers, which {address} does not; switch it off"
            )

    # --- its figures

    def note(self, figures: MigrationInfo, error: str | None) -> None:
        """Keep what its engine says with a change of the status."""
        self._last, self.error = figures, error

    def ask(self) -> None:
        """Have its engine say how it stands now, if it goes on and the engine can."""
        link = self.state.engines.link
        if link is None or not self.busy:
            return
        try:
            found = link.ask(JobCommands.info).wait(_INFO_TIMEOUT_S)
        except (EngineDied, TimeoutError, WrongState):  # WrongState: not begun yet
            return  # then what we have is the best there is
        with self.state.lock:
            if self._last.status not in _LAST_WORDS:  # its last word may have come meanwhile
                self._last = found

    def info(self) -> MigrationInfo:
        """How it stands, by the last figures that it gave."""
        status = self.status  # first: the figures that belong to it have come before it changed
        last = self._last
        return replace(
            last,
            status=status,
            incoming=self.incoming,
            error_desc=self.error or last.error_desc,
            socket_address=self.addresses if self.incoming else (),
        )

    # --- what a user orders of it

    def start_postcopy(self) -> None:
        """Switch over as soon as possible."""

    def cancel(self) -> None:
        """Give up.

        :raises WrongState: there is no way back any more.
        """

    def pause(self) -> None:
        """Break a postcopy on purpose.

        :raises WrongState: there is nothing to break.
        """
        if self.status not in {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER}:
            raise WrongState(
                "migrate-pause is currently only supported during postcopy-active or "
                "postcopy-recover state"
            )
        self.state.engines.tell(JobCommands.pause)

    def resume(self, uri: str, overrides: Overrides) -> None:  # noqa: ARG002
        """Go on with a paused postcopy at ``uri``; when this returns it is not paused any more.

        :raises PostcopyError: it is paused still, or was never.
        """
        raise WrongState("Cannot resume if there is no paused migration")

    def arrived(self) -> None:
        """The destination has been seen to complete: nothing here is needed any more.

        :raises WrongState: it is known where the guest is.
        """
        raise WrongState(
            "x-migrate-arrived can only be run when an outgoing postcopy is paused, or when the "
            "link broke during the switchover"
        )

    def recover(self, uri: str) -> None:  # noqa: ARG002
        """Wait anew for the source of a paused postcopy, or go on with a paused restore.

        :raises PostcopyError: it cannot, or nothing is paused.
        """
        raise WrongState("Migrate recover can only be run when postcopy is paused.")

    def lost(self) -> None:
        """Give up on the source of a paused postcopy, as the parameter ``x-on-loss`` says.

        :raises WrongState: nothing is paused, or the parameter says ``hold``; nothing has changed.
        :raises HostCannot: this host, or this guest's accelerator, cannot poison pages.
        """
        raise WrongState("x-migrate-lost can only be run when an incoming postcopy is paused")

    def refuse_queued(self, reason: str) -> None:
        """Fail if it waits for a restore that will not end."""

    # --- what its engine says

    def outlives_failure(self) -> bool:
        """Whether another engine goes on where this one has failed; under the lock."""
        return False

    def on_status(self, to: Status) -> None:
        """It has got somewhere; on the link's reader thread."""
        if to is Status.COMPLETED:
            self.completed()
        if to in {Status.FAILED, Status.CANCELLED, Status.POSTCOPY_PAUSED}:
            self.state.ownership.try_move(Move.LOSE_TOUCH)
        if to is Status.POSTCOPY_ACTIVE:
            self.works()
        if to in ENDED:
            self.settle(to)
        else:
            self.progress.move(to)

    def works(self) -> None:
        """Pages flow after the switchover: a guest waits should the engine die, so have another ready."""
        self.state.engines.prepare(AHEAD_S)

    def completed(self) -> None:
        """Note what that means for the guest."""

    def settle(self, status: Status) -> None:
        """Say that it has ended, and let go of the engine.

        Under the lock: a caller that has seen the end, and closes us, finds nothing still going on.
        """
        state, ownership = self.state, self.state.ownership
        with state.lock:
            no_guest_comes = status is Status.FAILED and self.incoming and state.keeper.abandon()
            stands_still = ownership.owner is Owner.STOPPED
            ownership.try_move(Move.END)
            state.restore = None
            self.progress.move(status)
            state.listening = False
            state.awaits = state.awaits and not state.guest.owned
            state.engines.end()
            if state.guest.owned:
                state.engines.prepare(_SPARE_DELAY_S)
        if stands_still:
            self.resume_guest()
        if no_guest_comes and state.exit_on_error:
            state.on_incoming_failed(self.error or "the migration failed")

    # --- the end of its engine, under the lock

    def engine_died(self, engine: EngineProcess) -> None:
        """Its engine's link is gone, and nothing here has asked for that."""
        if not self.busy:
            self.state.engines.end()  # it was ready for a migration: that will get another
        elif not self.settle_if_arrived():
            self.engine_lost(engine)

    def engine_lost(self, engine: EngineProcess) -> None:
        """Its engine has died in the midst of it: nothing of it is left."""
        self.error = f"the engine process {engine.fate}; start the migration again"
        self.let_go(engine)
        self.settle(Status.CANCELLED if self.status is Status.CANCELLING else Status.FAILED)

    def let_go(self, engine: EngineProcess) -> None:
        """Undo here what it had begun with the guest."""

    def pause_for(self, engine: EngineProcess) -> None:
        """Pause: after switchover all that its engine knew is here, or at the peer."""
        self.state.engines.end()
        self.state.ownership.try_move(Move.LOSE_TOUCH)
        self.error = f"the engine process {engine.fate}; no page is lost: recover the migration"
        self.progress.move(Status.POSTCOPY_PAUSED, only_from=GIVEN_UP - {Status.POSTCOPY_PAUSED})

    def has_arrived(self) -> bool:
        """Whether an engine has nothing left to do but to say so."""
        return False

    def settle_if_arrived(self) -> bool:
        """An engine may die with nothing left to do, or while its last call is answered here."""
        if not (self.busy and self.has_arrived()):
            return False
        self.error = None
        self.completed()
        self.settle(Status.COMPLETED)
        return True

    def check_paused(self) -> None:
        """Refuse to go on with what is not paused.

        :raises WrongState: it is not, or has just been found to have ended.
        """
        if self.status is not Status.POSTCOPY_PAUSED or self.settle_if_arrived():
            raise WrongState(f"nothing to recover from any more: {self.status.value}")

    def resume_guest(self) -> None:
        """Let the guest run on, or say why it cannot."""
        try:
            self.state.guest.resume()
        except PostcopyError as error:
            self.error = f"{self.error}; and the guest cannot go on: {error}"


def refuse_busy() -> NoReturn:
    """Refuse an order while another is under way.

    :raises WrongState: always.
    """
    raise WrongState("There's a migration process in progress", Reason.BUSY)


def check_host(capabilities: Capabilities, guest: OwnedGuest, *, awaits: bool) -> None:
    """Refuse capabilities that this host cannot do, in QEMU's words and before anything moves.

    :param guest: if it runs, it writes to its memory while it is saved.
    :param awaits: a guest is to come here.
    :raises HostCannot: there is no userfaultfd for it, or no dirty log.
    """
    if capabilities.enabled(Capability.DIRTY_LIMIT) and guest.accelerator_name != "kvm":
        what = "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"
        raise HostCannot(what, "run the guest with KVM: ours needs no ring")
    if awaits and capabilities.enabled(Capability.POSTCOPY_RAM):
        _check_userfaultfd(MISSING_FEATURES, "Postcopy is not supported")
    if guest.running and capabilities.enabled(Capability.BACKGROUND_SNAPSHOT):
        _check_userfaultfd(SNAPSHOT_FEATURES, "Background-snapshot is not supported by host kernel")


def _check_userfaultfd(features: Feature, what: str) -> None:
    try:
        Userfaultfd.open(features).close()
    except HostCannot as error:
        raise error.because(what) from error
