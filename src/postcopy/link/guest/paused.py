"""What a user orders of a postcopy that is broken, or is to be: pause, recover, resume, and give up."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from postcopy.channel.address import parse
from postcopy.channel.descriptor_check import Use
from postcopy.errors import PostcopyError, Refused, WrongState
from postcopy.link.guest.background_order import BackgroundOrder
from postcopy.link.guest.engine_slot import EngineSlot
from postcopy.link.guest.keeper import GuestKeeper, OwnedGuest
from postcopy.link.guest.outcome import Outcome
from postcopy.link.guest.preflight import check_poison, check_transport
from postcopy.link.guest.queued_migration import QueuedMigration
from postcopy.link.protocol import JobCommands
from postcopy.ownership import Move, Owner
from postcopy.parameters import Overrides
from postcopy.status import Status

_GONE = "the source is gone for good"


class Paused:
    """Takes these orders; what must be checked when, and what is known then, is here."""

    def __init__(
        self,
        guest: OwnedGuest,
        keeper: GuestKeeper,
        engines: EngineSlot,
        outcome: Outcome,
        departing: QueuedMigration,
    ) -> None:
        self._guest = guest
        self._ownership = guest.ownership
        self._keeper = keeper
        self._engines = engines
        self._outcome = outcome
        self._current = outcome.current
        self._recovery = outcome.recovery
        self._restoring = outcome.restoring
        self._queued = departing
        self._lock = self._current.lock
        self._background = BackgroundOrder()

    def pause(self) -> None:
        """Break a postcopy on purpose."""
        self._restoring.refuse_pause()
        shown = self._current.shown
        # A source whose destination does not answer waits for it in `postcopy-device`, perhaps for ever,
        # and one that cannot connect again in `postcopy-recover-setup`.
        waits = frozenset({Status.POSTCOPY_DEVICE, Status.POSTCOPY_RECOVER_SETUP})
        early = frozenset() if shown.incoming else waits
        if shown.status not in {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER} | early:
            raise WrongState(
                "migrate-pause is currently only supported during postcopy-active or "
                "postcopy-recover state"
            )
        self._engines.tell(JobCommands.pause)

    def recover(self, uri: str) -> None:
        """Listen anew for the source of a paused postcopy."""
        self._show_paused_restore()
        if (
            self._current.shown.status is not Status.POSTCOPY_PAUSED
            or not self._current.shown.incoming
        ):
            raise WrongState("Migrate recover can only be run when postcopy is paused.")
        recover = self._restoring.recover
        if self._restoring.job is None:
            check_transport(parse(uri), self._current.shown.settings.capabilities, Use.RECEIVE)
            recover = self._recovery.listen
        self._background.run(partial(recover, uri), self._not_recovered)
        self._ownership.ordered("migrate-recover", "incoming", uri)

    def _not_recovered(self, error: Exception) -> None:
        """It has turned out too late for the answer to the order."""
        with self._lock:
            job = self._current.shown
            if job.status is Status.POSTCOPY_PAUSED:
                job.error = f"the recovery that was ordered has failed: {error}"

    def _show_paused_restore(self) -> None:
        """Show the paused restore again, in place of a migration that waited for it."""
        with self._lock:
            restore = self._restoring.job
            if restore is not None and restore.status is Status.POSTCOPY_PAUSED:
                self._queued.fail("the guest's restore is paused")
                self._current.shown = restore

    def lost(self) -> None:
        """Give up on the source of a paused postcopy, as the parameter ``x-on-loss`` says."""
        self._show_paused_restore()
        with self._recovery.lock, self._lock:
            job = self._current.shown
            if job.status is not Status.POSTCOPY_PAUSED or not job.incoming:
                raise WrongState(
                    "x-migrate-lost can only be run when an incoming postcopy is paused"
                )
            how = job.settings.parameters.x_on_loss
            job.error = apply_on_loss(how, self._guest, self._keeper, self._engines.end)
            self._current.awaits = self._current.listening = False
            job.forget()
            self._restoring.end()
            job.progress.move(Status.FAILED)
            if how == "quit":
                self._outcome.on_incoming_failed(job.error)

    def arrived(self) -> None:
        """The destination has been seen to complete: nothing here is needed any more."""
        with self._recovery.lock, self._lock:
            job = self._current.shown
            if self._ownership.owner not in {Owner.UNKNOWN, Owner.TAKEN} or job.status not in {
                Status.POSTCOPY_PAUSED,
                Status.FAILED,
            }:
                raise WrongState(
                    "x-migrate-arrived can only be run when an outgoing postcopy is paused, or when the "
                    "link broke during the switchover"
                )
            self._ownership.move(Move.MOVED)
            self._keeper.unwatch_writes()
            if not self._outcome.settle_if_arrived():
                self._outcome.on_moved()

    def resume(self, uri: str, overrides: Overrides) -> None:
        """Go on with a paused postcopy at ``uri``."""
        if overrides:
            raise Refused(
                "'resume' goes on with what the migration began with; leave x-capabilities and "
                "x-parameters out ('migrate-set-parameters' reaches a paused migration)"
            )
        check_transport(parse(uri), self._current.shown.settings.capabilities, Use.SEND)
        with self._recovery.lock:
            if (
                self._current.shown.status is not Status.POSTCOPY_PAUSED
                or self._current.shown.incoming
            ):
                raise WrongState("Cannot resume if there is no paused migration")
            self._ownership.check(Move.RESUME)
            self._ownership.ordered("migrate-resume", "outgoing", uri)
            try:
                # From here until it has failed again 'cont' cannot take it back.
                self._recovery.go_on(uri, lambda: self._ownership.move(Move.RESUME))
            except PostcopyError:
                self._ownership.try_move(Move.LOSE_TOUCH)
                raise


def apply_on_loss(
    how: str, guest: OwnedGuest, keeper: GuestKeeper, end_engine: Callable[[], None]
) -> str:
    """Give the missing pages up.

    :param how: the parameter ``x-on-loss``.
    :param end_engine: called when that is possible: from here on there is no way back.
    :return: what to tell the user.
    :raises WrongState: ``hold``; nothing has changed, as with every error.
    :raises HostCannot: this host, or this guest's accelerator, cannot poison pages.
    """
    match how:
        case "poison":
            return _poison(guest, keeper, end_engine)
        case "quit":
            return _abandon(guest, keeper, end_engine)
    raise WrongState(
        "x-on-loss is 'hold': the guest waits for its source; set it to 'poison' or 'quit' first, if "
        "the source is gone for good"
    )


def _poison(guest: OwnedGuest, keeper: GuestKeeper, end_engine: Callable[[], None]) -> str:
    """The guest goes on without the pages that will never come, and never reads zeros instead."""
    check_poison(guest)
    end_engine()
    lost = keeper.poison_missing()
    pages = ", ".join(f"{count} pages of block '{name}'" for name, count in lost.items())
    return f"{_GONE}: {pages} are lost; a vCPU that touches one of them fails"


def _abandon(guest: OwnedGuest, keeper: GuestKeeper, end_engine: Callable[[], None]) -> str:
    """The guest cannot go on: let go of what its vCPUs wait for, as far as that is possible."""
    end_engine()
    with suppress(PostcopyError):  # a vCPU that waits for a page may be unstoppable
        check_poison(guest)
        keeper.poison_missing()
    return f"{_GONE}, and the guest cannot go on without its pages"
