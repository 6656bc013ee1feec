"""Going on with a broken postcopy: by the engine that has paused, or by one in place of a dead one.

An engine that has just died may still look alive.  That is found out here, and is no reason to
refuse anybody: all that it knew is in the guest's memory, or at the peer.
"""

from collections.abc import Callable, Sequence

from postcopy.channel.address import bound_uri, parse
from postcopy.channel.descriptor_check import Use, descriptors_for
from postcopy.errors import EngineDied, PostcopyError, WrongState
from postcopy.link.guest.engine_slot import EngineSlot, EngineSupervisor
from postcopy.link.guest.job import Job
from postcopy.link.protocol import IncomingCommands, JobCommands, OutgoingCommands
from postcopy.link.values import sent
from postcopy.status import Status


class Recovery:
    """The recoveries of one guest's migrations, on either side.

    :param job: the migration that was ordered last.
    :param settle_if_arrived: ends a migration that has nothing left to do; returns whether it had.
    """

    def __init__(
        self,
        engines: EngineSlot,
        job: Callable[[], Job],
        settle_if_arrived: Callable[[], bool],
    ) -> None:
        self._engines = engines
        self._job = job
        self._settle_if_arrived = settle_if_arrived
        self._supervisor = EngineSupervisor(
            self._needs_successor,
            lambda: self._adopt_destination(self._uri),
            self._no_successor,
            engines.prepare,
        )
        self.lock = self._supervisor.lock
        """Held while an engine is put in place of a dead one, or told to go on."""
        self._uri = ""

    def listens_at(self, uri: str) -> None:
        """A destination listens there: a port of 0 has become one of its job's addresses."""
        self._uri = bound_uri(uri, self._job().addresses)

    def works(self) -> None:
        """Pages flow: should the engine die now, that is no reason to give up."""
        self._supervisor.worked()

    def engine_died(self) -> None:
        """Put another in its place, where the guest waits for pages: at the destination."""
        self._supervisor.begin()

    def listen(self, uri: str) -> None:
        """Wait at ``uri`` for the source of a paused postcopy.

        :raises PostcopyError: it cannot be listened on, or nothing is paused any more.
        """
        with descriptors_for(parse(uri), Use.RECEIVE) as fds, self.lock:
            job = self._job()
            before, job.addresses = job.addresses, ()  # until it listens
            try:
                self._listen(uri, fds)
            except PostcopyError:
                job.addresses = before
                raise
            self.listens_at(uri)

    def _listen(self, uri: str, fds: Sequence[int]) -> None:
        try:
            found = self._engines.call(IncomingCommands.recover_destination, uri, sent(fds))
            self._job().addresses = tuple(found)
        except EngineDied:
            self._check_paused()
            self._supervisor.count_anew()
            self._adopt_destination(uri, fds)

    def go_on(self, uri: str, give_up: Callable[[], object]) -> None:
        """Have the source of a paused postcopy go on at ``uri``; the caller holds :attr:`lock`.

        When this returns it has left ``postcopy-paused``, whatever becomes of it then.

        :param give_up: called before each attempt: the end of an engine lets 'cont' take the guest.
        :raises PostcopyError: it has not.
        """
        with descriptors_for(parse(uri), Use.SEND) as fds:
            try:
                give_up()
                self._engines.call(OutgoingCommands.resume_source, uri, sent(fds))
            except EngineDied:
                # Nothing has been said to the destination: that comes with the order below.
                self._check_paused()
                settings = self._job().settings
                order = OutgoingCommands.adopt_source
                self._engines.adopt(order, settings.capabilities, settings.parameters)
                give_up()
                self._engines.call(OutgoingCommands.resume_source, uri, sent(fds))
        self._engines.tell(OutgoingCommands.go_on)

    def _adopt_destination(self, uri: str, fds: Sequence[int] = ()) -> None:
        """Start an engine in place of one that has died under a guest that runs here.

        It listens at once, and serves again when the source has come back.
        """
        job = self._job()
        settings, order = job.settings, IncomingCommands.adopt_destination
        _, addresses = self._engines.adopt(
            order, uri, settings.capabilities, settings.parameters, sent(fds)
        )
        # What the user has said meanwhile may have reached no engine.
        self._engines.tell(JobCommands.set_parameters, job.settings.parameters)
        job.addresses = tuple(addresses)

    def _check_paused(self) -> None:
        if self._job().status is not Status.POSTCOPY_PAUSED or self._settle_if_arrived():
            status = self._job().status.value
            raise WrongState(f"nothing to recover from any more: {status}")

    def _needs_successor(self) -> bool:
        """Whether an engine is to be put in place of a dead one: the user may have been quicker."""
        paused = self._job().status is Status.POSTCOPY_PAUSED
        return paused and self._engines.current is None and not self._settle_if_arrived()

    def _no_successor(self, error: PostcopyError) -> None:
        if not self._settle_if_arrived():
            # Its address may be taken by now: migrate-recover with another starts one again.
            job = self._job()
            job.error = f"{job.error}; no successor could listen: {error}"
