"""A guest that arrives: what a migration and a restore of one have in common, and the migration.

An engine that dies while the guest runs loses nothing: all that it knew is in the guest's memory, or at the
source.  So another is put in its place, unasked, and listens where the dead one did.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from postcopy.abi.userfaultfd import Feature
from postcopy.channel.address import bound_uri, parse
from postcopy.channel.descriptor_check import Use, descriptors_for
from postcopy.errors import EngineDied, HostCannot, PostcopyError, WrongState
from postcopy.kernel import threads
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.engine_slot import AHEAD_S
from postcopy.link.guest.job import Job, MigrationState
from postcopy.link.guest.owned_guest import OwnedGuest
from postcopy.link.protocol import IncomingCommands, JobCommands
from postcopy.link.rpc import Link
from postcopy.link.values import sent
from postcopy.ownership import Move
from postcopy.parameters import Settings
from postcopy.statistics import MigrationInfo
from postcopy.status import AFTER_SWITCHOVER, Status

_GONE = "the source is gone for good"

_MOST_REPLACEMENTS: Final = 5
"""Engines to start, one after the other, when none lives to get anywhere."""

_MOST_A_MINUTE: Final = 20
"""Engines to start when each gets somewhere, and none far."""

_A_MINUTE_S: Final = 60.0


class EngineSupervisor:
    """Puts an engine in place of a dead one, unless they die one after the other.

    :param wanted: whether one is needed still; asked under :attr:`lock`.
    :param adopt: starts one that goes on where the dead one was.
    :param failed: gets the reason when none could go on.
    :param ahead: has an engine started, after so many seconds: a guest waits when one dies.
    """

    def __init__(
        self,
        wanted: Callable[[], bool],
        adopt: Callable[[], None],
        failed: Callable[[PostcopyError], None],
        ahead: Callable[[float], None],
    ) -> None:
        self._ahead = ahead
        self._wanted = wanted
        self._adopt = adopt
        self._failed = failed
        self._replacements = 0
        self._deaths_s: deque[float] = deque(maxlen=_MOST_A_MINUTE + 1)  # monotonic, the last ones
        self.lock = threading.Lock()
        """Held while an engine is put in place of a dead one."""

    def begin(self) -> None:
        """Have the dead one replaced, by a thread of its own."""
        thread = threading.Thread(target=self._replace, name="replace-engine", daemon=True)
        try:
            threads.start(thread)
        except HostCannot as error:
            self._failed(error)

    def worked(self) -> None:
        """The engine at work has got somewhere: count anew, and have a successor ready in a while."""
        self._replacements = 0
        self._ahead(AHEAD_S)

    def count_anew(self) -> None:
        """A user has ordered one: those that have died before are of no account."""
        self._deaths_s.clear()
        self.worked()

    @property
    def tries_left(self) -> bool:
        """Whether to begin again, after those that have died: the one too many gives up, and says so."""
        return self._replacements <= _MOST_REPLACEMENTS and not self._die_too_fast

    @property
    def _die_too_fast(self) -> bool:
        times_s = self._deaths_s
        return len(times_s) == times_s.maxlen and times_s[-1] - times_s[0] < _A_MINUTE_S

    def _replace(self) -> None:
        with self.lock:
            self._replacements += 1
            self._deaths_s.append(time.monotonic())
            if not self._wanted():
                return
            try:
                if not self.tries_left:
                    raise EngineDied("they die one after the other")
                self._adopt()
            except PostcopyError as error:
                self._failed(error)


class IncomingJob(Job, ABC):
    """A guest that is to run here, from wherever its pages come."""

    incoming = True

    def __init__(self, state: MigrationState, settings: Settings) -> None:
        super().__init__(state, settings)
        self.supervisor = EngineSupervisor(
            self.needs_successor, self.adopt, self.no_successor, state.engines.prepare
        )

    # --- how it begins

    @abstractmethod
    def prepare(self, link: Link) -> None:
        """Have an engine be ready for the guest, of which nothing is touched yet.

        :raises PostcopyError: it cannot.
        """

    def begin(self, link: Link) -> None:
        """From now on it is what is under way; under the lock.

        :raises EngineDied: the engine has died since it was ready.
        """
        if self.state.engines.link is not link:
            raise EngineDied("the engine process died; give the order again")
        self.state.shown = self
        self.state.listening = True
        self.progress.move(Status.SETUP)

    @abstractmethod
    def start(self, link: Link) -> None:
        """Have the engine take the guest."""

    # --- what its engine says, and its end

    def works(self) -> None:
        self.state.ownership.try_move(Move.ARRIVING)
        self.supervisor.worked()

    def completed(self) -> None:
        self.state.awaits = False

    def guest_arrived(self) -> None:
        """The guest is ours from now on."""
        self.state.guest.announcer.begin(self.settings.parameters.announcement)

    def has_arrived(self) -> bool:
        return self.state.guest.owned and not self.state.keeper.watches_missing

    @abstractmethod
    def needs_successor(self) -> bool:
        """Whether an engine is to be put in place of a dead one: the user may have been quicker."""

    @abstractmethod
    def adopt(self) -> None:
        """Put an engine in place of one that has died.

        :raises PostcopyError: it cannot go on.
        """

    @abstractmethod
    def no_successor(self, error: PostcopyError) -> None:
        """None could be put there."""

    def tell_parameters(self) -> None:
        """Tell the engine that has been put in place: what was set meanwhile may have reached none."""
        self.state.engines.tell(JobCommands.set_parameters, self.settings.parameters)

    # --- orders about one that is paused

    def recover(self, uri: str) -> None:
        if self.status is not Status.POSTCOPY_PAUSED:
            super().recover(uri)
        self.check_recovery(uri)
        self.state.background.run(partial(self.recover_at, uri), self._not_recovered)
        self.state.ownership.ordered("migrate-recover", "incoming", uri)

    def check_recovery(self, uri: str) -> None:
        """Refuse an address from which it cannot go on."""

    @abstractmethod
    def recover_at(self, uri: str) -> None:
        """Go on from there; on a thread of its own.

        :raises PostcopyError: it cannot.
        """

    def _not_recovered(self, error: Exception) -> None:
        """It has turned out too late for the answer to the order."""
        with self.state.lock:
            if self.status is Status.POSTCOPY_PAUSED:
                self.error = f"the recovery that was ordered has failed: {error}"

    def lost(self) -> None:
        state = self.state
        with state.lock:
            if self.status is not Status.POSTCOPY_PAUSED:
                super().lost()
            how = self.settings.parameters.x_on_loss
            self.error = self._apply_on_loss(how)
            state.awaits = state.listening = False
            self._last = MigrationInfo(incoming=True)  # its figures mean nothing any more
            state.restore = None
            self.progress.move(Status.FAILED)
            if how == "quit":
                state.on_incoming_failed(self.error)

    def _apply_on_loss(self, how: str) -> str:
        """Give the missing pages up, and the engine when that is possible: then there is no way back.

        :param how: the parameter ``x-on-loss``.
        :return: what to tell the user.
        """
        match how:
            case "poison":
                _check_poison(self.state.guest)
                self.state.engines.end()
                # The guest goes on without the pages that will never come, and never reads zeros instead.
                lost = self.state.keeper.poison_missing()
                pages = ", ".join(
                    f"{count} pages of block '{name}'" for name, count in lost.items()
                )
                return f"{_GONE}: {pages} are lost; a vCPU that touches one of them fails"
            case "quit":
                self.state.engines.end()
                with suppress(PostcopyError):  # a vCPU that waits for a page may be unstoppable
                    _check_poison(self.state.guest)
                    self.state.keeper.poison_missing()
                return f"{_GONE}, and the guest cannot go on without its pages"
        raise WrongState(
            "x-on-loss is 'hold': the guest waits for its source; set it to 'poison' or 'quit' first, if "
            "the source is gone for good"
        )


class IncomingMigration(IncomingJob):
    """A guest that comes over a channel.

    :param uri: where it is waited for.
    """

    def __init__(self, state: MigrationState, settings: Settings, uri: str = "") -> None:
        super().__init__(state, settings)
        self._uri = uri

    def prepare(self, link: Link) -> None:
        with descriptors_for(parse(self._uri), Use.RECEIVE) as fds:
            found = link.call(IncomingCommands.listen, self._uri, self.settings, sent(fds))
        self._listens(self._uri, found)

    def start(self, link: Link) -> None:
        link.note(IncomingCommands.accept)

    def _listens(self, uri: str, addresses: Iterable[Mapping[str, Any]]) -> None:
        self.addresses = tuple(addresses)
        self._uri = bound_uri(uri, self.addresses)  # a port of 0 has become one of them

    def engine_lost(self, engine: EngineProcess) -> None:
        if self.status not in AFTER_SWITCHOVER:
            super().engine_lost(engine)
            return
        if not self.state.guest.owned:
            self.resume_guest()  # its devices are loaded, and the source has been told so
            self.guest_arrived()
        self.pause_for(engine)
        self.supervisor.begin()

    def needs_successor(self) -> bool:
        paused = self.status is Status.POSTCOPY_PAUSED
        return paused and self.state.engines.current is None and not self.settle_if_arrived()

    def adopt(self) -> None:
        self._adopt(self._uri)

    def _adopt(self, uri: str, fds: Sequence[int] = ()) -> None:
        """It listens at once, and serves again when the source has come back."""
        order = IncomingCommands.adopt_destination
        _, addresses = self.state.engines.adopt(order, uri, self.settings, sent(fds))
        self.tell_parameters()
        self.addresses = tuple(addresses)

    def no_successor(self, error: PostcopyError) -> None:
        if not self.settle_if_arrived():
            # Its address may be taken by now: migrate-recover with another starts one again.
            self.error = f"{self.error}; no successor could listen: {error}"

    def check_recovery(self, uri: str) -> None:
        self.check_address(uri)

    def recover_at(self, uri: str) -> None:
        with descriptors_for(parse(uri), Use.RECEIVE) as fds, self.supervisor.lock:
            before, self.addresses = self.addresses, ()  # until it listens
            try:
                self._listen_again(uri, fds)
            except PostcopyError:
                self.addresses = before
                raise
            self._listens(uri, self.addresses)

    def _listen_again(self, uri: str, fds: Sequence[int]) -> None:
        """By the engine that has paused, or by one in place of a dead one, which may still look alive."""
        try:
            order = IncomingCommands.recover_destination
            self.addresses = tuple(self.state.engines.call(order, uri, sent(fds)))
        except EngineDied:
            self.check_paused()
            self.supervisor.count_anew()
            self._adopt(uri, fds)

    def lost(self) -> None:
        with self.supervisor.lock:  # no engine is just being put in place of a dead one
            super().lost()


def _check_poison(guest: OwnedGuest) -> None:
    """Refuse what would leave the guest half-way."""
    cure = "set x-on-loss to 'quit', or wait for the source with 'hold'"
    if guest.accelerator_name != "kvm":
        raise HostCannot("a software CPU cannot be stopped at a page that is lost", cure)
    try:
        Userfaultfd.open(Feature.POISON).close()
    except HostCannot as error:
        raise HostCannot(f"pages cannot be poisoned: {error.what}", cure) from error
