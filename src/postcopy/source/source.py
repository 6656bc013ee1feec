"""The source of one migration.

Threads: ``source`` runs :meth:`Source.run`, from connecting to the end, and again :meth:`Source.recover`
after a break; ``return-path`` listens to the destination and serves its page requests.  The status is
changed by the first alone, but for a user's cancel.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from postcopy.channel.address import parse
from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import RateLimiter
from postcopy.errors import ChannelBroken, MigrationCancelled, PostcopyError, WrongState
from postcopy.guest import DeviceState, LeavingGuest
from postcopy.multifd.sender import MultifdSender, sender_for
from postcopy.multifd.threads import FileAccess
from postcopy.ownership import Move
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.source.auto_converge import Convergence
from postcopy.source.connection import Connection
from postcopy.source.connector import Connector, check_answers, is_answered
from postcopy.source.counters import Counters, Rate, StageTimes, describe
from postcopy.source.dirty_pages import DirtyPages, SourceMemory
from postcopy.source.flow_control import PushPolicy
from postcopy.source.page_sink import page_sink_for
from postcopy.source.precopy import Outcome, Precopy
from postcopy.source.switchover import OURS_ONLY, Switchover
from postcopy.source.user_requests import UserRequests
from postcopy.statistics import MigrationInfo
from postcopy.status import GIVEN_UP, Status, StatusMachine
from postcopy.stream import encoder
from postcopy.stream.encoder import stream_header
from postcopy.stream.pings import HEADER_PING, PACKAGE_PING
from postcopy.tls_options import TlsOptions
from postcopy.trace import trace


@dataclass(frozen=True, slots=True)
class MigrationOptions:
    """What the user has set, fixed for one migration but for the parameters."""

    uri: str
    capabilities: Capabilities
    ours_only: frozenset[str] = OURS_ONLY
    """Device sections that a real QEMU would refuse."""
    tls: TlsOptions | None = None


class Source:
    """One outgoing migration."""

    def __init__(
        self,
        guest: LeavingGuest,
        memory: SourceMemory,
        options: MigrationOptions,
        parameters: Parameters,
        progress: StatusMachine,
        describe_devices: Callable[[Sequence[DeviceState]], str],
        on_pass: Callable[[int], None],
    ) -> None:
        self._guest = guest
        self._memory = memory
        self._options = options
        self._parameters = parameters
        self._progress = progress
        self._describe_devices = describe_devices
        self._on_pass = on_pass
        self.requests = UserRequests()
        self._connector = Connector(self.requests, options.tls)
        self._preempt = options.capabilities.enabled(Capability.POSTCOPY_PREEMPT)
        self.error: PostcopyError | None = None
        self._counters, self._clock = Counters(), StageTimes()
        self._limiter, self._policy = RateLimiter(parameters.max_bandwidth), PushPolicy()
        self._convergence = Convergence(guest, options.capabilities, lambda: self._parameters)
        # Made by the steps of the migration, in this order; a recovery makes another connection.
        self._dirty: DirtyPages | None = None
        self._connection: Connection | None = None
        self._switchover: Switchover | None = None
        self._reads_after_both: bool | None = None
        """Whether the destination reads nothing before the second connection is there; None: not known."""
        self._ran_there = self._paused_by_user = False

    # --- called by the monitor, from other threads

    def cancel(self) -> None:
        """Cancel, unless the destination may already have the guest."""
        before = frozenset({Status.SETUP, Status.ACTIVE, Status.PRE_SWITCHOVER, Status.DEVICE})
        if self._progress.move(Status.CANCELLING, only_from=before):
            self.requests.cancel()
            self._break()  # end the wait of a send to a peer that does not read

    def end_command(self) -> bool:
        """See :meth:`Connection.end_command`."""
        return self._connection is not None and self._connection.end_command()

    def pause(self) -> None:
        """Break the connection on purpose.

        A break while the package is on its way would leave the owner of the guest unknown.  So the
        connection is broken once the destination has taken the package, or is silent for too long.
        """
        self._paused_by_user = True
        self.requests.interrupt.set()  # it may still be connecting
        if self._ran_there or not self._parameters.x_link_timeout:
            self._break()

    def leave(self) -> None:
        """The engine ends: so does a command at the other end of the channel."""
        self._connector.leave()

    def _break(self) -> None:
        if self._connection is not None:
            self._connection.shutdown()

    def set_parameters(self, parameters: Parameters) -> None:
        """Take over parameters that the user has changed meanwhile."""
        self._parameters = parameters
        after = self._progress.status in GIVEN_UP
        rate = parameters.max_postcopy_bandwidth if after else parameters.max_bandwidth
        self._limiter.set_rate(rate)

    @property
    def dirty(self) -> DirtyPages | None:
        """What is still to send; None before the memory is mapped."""
        return self._dirty

    def info(self) -> MigrationInfo:
        """The figures as they are now."""
        remaining = self._dirty.remaining_bytes if self._dirty is not None else 0
        rate = self._connection.sender.rate if self._connection is not None else Rate()
        status, held = self._progress.status, self._convergence.percent
        return describe(self._counters, rate, self._clock, status, remaining, held)

    # --- the thread of the source

    def run(self) -> None:
        """Move the guest; however it ends, the guest has exactly one owner."""
        self._until_the_end(self._migrate)

    def begin_recovery(self) -> None:
        """Leave ``postcopy-paused``; :meth:`recover` does the rest.

        :raises WrongState: it is not paused, or another recovery has begun.
        """
        self.error, self._paused_by_user, self._clock.ended = None, False, 0.0
        paused = frozenset({Status.POSTCOPY_PAUSED})
        if not self._progress.move(Status.POSTCOPY_RECOVER_SETUP, only_from=paused):
            raise WrongState("Cannot resume if there is no paused migration")

    def recover(self, uri: str) -> None:
        """Resume a broken postcopy over another connection, after :meth:`begin_recovery`."""
        self._until_the_end(lambda: self._resume(uri))

    def _until_the_end(self, steps: Callable[[], None]) -> None:
        try:
            steps()
            self._clock.ended = time.monotonic()
            self._progress.move(Status.COMPLETED)
        except PostcopyError as error:
            self._fail(error)
        finally:
            self._convergence.stop()
            self._let_go()

    def _migrate(self) -> None:
        connection, dirty = self._set_up()
        precopy = Precopy(
            dirty,
            connection.sender,
            self._counters,
            self.requests,
            lambda: self._parameters,
            self._on_pass,
            self._convergence,
        )
        outcome = precopy.run()
        if outcome is Outcome.CANCELLED:
            raise MigrationCancelled("cancelled by the user")
        if outcome is Outcome.POSTCOPY and self._preempt:
            connection.answers.wait_pong(HEADER_PING)  # it has taken this one as the main channel
            self._open_preempt(connection, self._options.uri)
            connection.check_preempt()
        self._switchover = switchover = self._make_switchover(connection, dirty)
        if outcome is Outcome.POSTCOPY:
            switchover.discard_ahead()
        switchover.stop_guest()
        self._convergence.stop()
        trace("source.guest-stopped")
        connection.sender.phase = "downtime_bytes"
        self._on_pass(dirty.syncs)
        if outcome is Outcome.SMALL_ENOUGH:
            switchover.complete_precopy()
        else:
            switchover.start_postcopy()
            # All that was sent has been read then: a reset cannot discard its report of a failure.
            connection.answers.wait_pong(PACKAGE_PING)
            self._ran_there = True
            self._progress.move(Status.POSTCOPY_ACTIVE)
            if self._paused_by_user:
                self._break()
            trace("source.package-taken")
            self._clock.confirmed = connection.answers.pong_s(PACKAGE_PING)
            self._complete_postcopy(connection)
        connection.sender.count()
        dirty.stop()
        connection.finish()
        if connection.return_path is None:
            self._guest.move(Move.SAVE)

    def _set_up(self) -> tuple[Connection, DirtyPages]:
        tracker = self._memory.tracker(self._parameters.x_dirty_tracking)
        address = parse(self._options.uri)
        channel = self._connector.connect(address)
        trace("source.connected")
        try:
            blocks = self._memory.blocks()
            self._counters.total_bytes = sum(block.size_bytes for block in blocks)
            self._dirty = dirty = DirtyPages(blocks, tracker)
        except BaseException:
            channel.close()
            raise
        capabilities = self._options.capabilities
        postcopy = capabilities.enabled(Capability.POSTCOPY_RAM)
        answered = is_answered(channel, capabilities)
        multifd = sender_for(capabilities, self._parameters)
        connection = self._connect(channel, multifd, answered=answered)
        page_sizes = [block.page_size_bytes for block in blocks]
        name = self._guest.machine_name
        channel.send(stream_header(name, page_sizes, capabilities, answered=answered))
        connection.open_multifd(self._connector, address, self._parameters.multifd_channels)
        self._open_preempt_if_awaited(connection, self._options.uri)
        connection.wait_until_let_in(acknowledged=self._parameters.acknowledged(capabilities))
        connection.sender.begin(blocks, postcopy=postcopy)
        dirty.start()
        self._on_pass(dirty.syncs)
        self._clock.set_up = time.monotonic()
        self._progress.move(Status.ACTIVE)
        trace("source.active")
        return connection, dirty

    def _open_preempt_if_awaited(self, connection: Connection, uri: str) -> None:
        if self._preempt and self._reads_after_both is None:
            self._reads_after_both = connection.reads_after_both()
        if self._reads_after_both:
            self._open_preempt(connection, uri)

    def _open_preempt(self, connection: Connection, uri: str) -> None:
        """Connect once more; the destination knows the two connections by their order."""
        if not self._preempt or connection.has_preempt:
            return
        channel = connection.connect_beside(self._connector, parse(uri))
        connection.open_preempt(channel, sends_end=bool(self._reads_after_both))

    def _connect(
        self, channel: Channel, beside: MultifdSender | None = None, *, answered: bool
    ) -> Connection:
        assert self._dirty is not None
        channel.watch(self._parameters.x_link_timeout / 1000)
        on, cache = self._options.capabilities, lambda: self._parameters.xbzrle_cache_size
        access = FileAccess.wanted(on, self._parameters)
        sink = page_sink_for(channel, on, self._limiter, self._counters, cache, beside, access)
        self._connection = Connection(
            channel,
            self._dirty,
            sink,
            self._counters,
            self._policy,
            self.requests.interrupt,
            lambda: self._parameters.x_link_timeout,
            beside,
            answered=answered,
        )
        if self.requests.cancelled or self._paused_by_user:
            channel.shutdown()  # the request came before the connection
        return self._connection

    def _make_switchover(self, connection: Connection, dirty: DirtyPages) -> Switchover:
        return Switchover(
            self._guest,
            connection,
            dirty,
            self.requests,
            self._progress,
            self._options.capabilities,
            self._counters,
            self._clock,
            self._describe_devices,
            self._options.ours_only,
        )

    def _complete_postcopy(self, connection: Connection) -> None:
        connection.sender.count()
        connection.sender.phase = "postcopy_bytes"
        self._limiter.set_rate(self._parameters.max_postcopy_bandwidth)
        connection.channel.bound_buffers(self._policy.send_buffer_bytes)
        trace("source.pushing")
        leave_zeros_out = self._memory.leaves_zeros_out and not connection.answers.peer_is_ours
        connection.push.run(connection.answers, leave_zeros_out=leave_zeros_out)
        arrived = connection.wait_until_taken()
        if arrived:
            self._guest.move(Move.MOVED)
        trace("source.all-pushed")
        last = [connection.sender.end_of_ram(), encoder.end_of_stream()]
        try:
            connection.end(last)
        except ChannelBroken:
            if not arrived:
                raise
        trace("source.arrived")

    # --- recovery

    def adopt(self) -> None:
        """Take over a paused postcopy whose engine has died: its state is in the guest's memory."""
        blocks = self._memory.blocks()
        self._counters.total_bytes = sum(block.size_bytes for block in blocks)
        self._dirty = DirtyPages(blocks, self._memory.tracker("pagemap"))
        trace("source.adopted")

    def _resume(self, uri: str) -> None:
        assert self._dirty is not None
        self._ran_there = True  # else the destination would not wait for a recovery
        channel = self._connector.connect(parse(uri), lambda: self._paused_by_user)
        check_answers(channel)
        connection = self._connect(channel, answered=True)
        connection.push.begin()
        self._progress.move(Status.POSTCOPY_RECOVER)
        trace("source.recovery-connected")
        self._open_preempt_if_awaited(
            connection, uri
        )  # before the watch: a destination may be silent for that
        connection.begin_watch()
        connection.resume(self._dirty, lambda: self._open_preempt(connection, uri))
        if self._memory.leaves_zeros_out:
            connection.ask_identity()
        self._progress.move(Status.POSTCOPY_ACTIVE)
        self._complete_postcopy(connection)
        connection.sender.count()
        self._dirty.stop()
        connection.finish()

    # --- when something went wrong

    def _fail(self, error: PostcopyError) -> None:
        """Decide which side has the guest, and report the failure."""
        if isinstance(error, MigrationCancelled):
            self.cancel()  # only the guest's process knows of it so far
        if self._connection is not None:
            error = self._connection.explain(error)
        broken = self._progress.status in GIVEN_UP and not self._never_ran_there()
        if broken and self._paused_by_user:
            error = ChannelBroken("Postcopy migration is paused by the user")
        cancelled = self._progress.status is Status.CANCELLING
        self.error = None if cancelled else error
        self._clock.ended = time.monotonic()
        if broken:
            self._progress.move(Status.POSTCOPY_PAUSED)
            return
        if self._dirty is not None:
            self._dirty.stop()
        switchover = self._switchover
        if switchover is not None and switchover.stopped:
            if not switchover.committed or self._runs_nowhere_else():
                switchover.settle()
                self._guest.move(Move.TAKE_BACK)
                self._guest.resume()
            else:
                self.error = PostcopyError(
                    f"{error}; the destination may be running the guest, so it stays stopped here: "
                    "'cont' takes it back"
                )
        self._progress.move(Status.CANCELLED if cancelled else Status.FAILED)

    def _runs_nowhere_else(self) -> bool:
        """Whether no other machine runs the guest by itself, although it has been given up."""
        at = self._connection
        return at is not None and (at.refused or at.channel.stores)

    def _never_ran_there(self) -> bool:
        """Whether the destination never got the package, or has reported that it could not take it.

        Only its own report counts: an ended connection does not tell which side runs the guest.
        """
        if self._switchover is not None and not self._switchover.committed:
            return True
        connection = self._connection
        return not self._ran_there and connection is not None and connection.answers.refused

    def _let_go(self) -> None:
        """Close what is open; the pages stay as long as a recovery may need them."""
        if self._connection is not None:
            self._connection.abandon()
        if self._progress.status is Status.POSTCOPY_PAUSED or self._dirty is None:
            return
        for pages in self._dirty.blocks:
            pages.block.close()
