"""The source of one migration.

Threads: ``source`` runs :meth:`Source.run`, from connecting to the end; ``return-path`` listens to the
destination and serves its page requests.  The status is changed by the first alone, but for a
user's cancel.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from postcopy.channel.address import parse
from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import RateLimiter
from postcopy.channel.sockets import SocketChannel
from postcopy.dirty.tracker import choose
from postcopy.errors import ChannelBroken, MigrationCancelled, PostcopyError, Refused
from postcopy.guest import DeviceState
from postcopy.link.guest_proxy import GuestProxy
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.source.connecting import connect_unless_cancelled
from postcopy.source.counters import Clock, Counters, Rate, describe
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.orders import Orders
from postcopy.source.page_sender import RAM_SECTION_ID, PageSender
from postcopy.source.postcopy import PostcopyPush
from postcopy.source.precopy import Outcome, Precopy
from postcopy.source.return_path import ReturnPath
from postcopy.source.switchover import PACKAGE_PING, Switchover
from postcopy.statistics import MigrationInfo
from postcopy.status import AFTER_SWITCHOVER, Progress, Status
from postcopy.stream import encoder
from postcopy.stream.commands import encode_command
from postcopy.stream.identity import IDENTITY_PING
from postcopy.stream.layout import BlockLayout
from postcopy.stream.records import (
    BlockEntry,
    CommandRecord,
    Configuration,
    OpenReturnPath,
    Ping,
    PostcopyAdvise,
    RamSetup,
)
from postcopy.stream.return_path import ReturnPathDecoder


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user has set, fixed for one migration but for the parameters."""

    uri: str
    capabilities: Capabilities


class Source:
    """One outgoing migration."""

    def __init__(
        self,
        guest: GuestProxy,
        wishes: Wishes,
        parameters: Parameters,
        progress: Progress,
        describe_devices: Callable[[Sequence[DeviceState]], str],
        on_pass: Callable[[int], None],
    ) -> None:
        self._guest = guest
        self._wishes = wishes
        self._parameters = parameters
        self._progress = progress
        self._describe_devices = describe_devices
        self._on_pass = on_pass
        self.orders = Orders()
        self.error: PostcopyError | None = None
        self._counters = Counters()
        self._clock = Clock()
        self._limiter = RateLimiter(parameters.max_bandwidth)
        # Made by the steps of the migration, in this order.
        self._channel: Channel | None = None
        self._sender: PageSender | None = None
        self._dirty: DirtyPages | None = None
        self._push: PostcopyPush | None = None
        self._return_path: ReturnPath | None = None
        self._switchover: Switchover | None = None

    # --- called by the monitor, from other threads

    def cancel(self) -> None:
        """Give up, unless the destination may already have the guest."""
        before = frozenset({Status.SETUP, Status.ACTIVE, Status.PRE_SWITCHOVER, Status.DEVICE})
        if self._progress.move(Status.CANCELLING, only_from=before):
            self.orders.cancel()
            if self._channel is not None:
                self._channel.shutdown()  # wake a send that waits for a peer who does not read

    def pause(self) -> None:
        """Break the postcopy on purpose."""
        if self._channel is not None:
            self._channel.shutdown()

    def set_parameters(self, parameters: Parameters) -> None:
        """Take over parameters that the user has changed meanwhile."""
        self._parameters = parameters
        after = self._progress.status in AFTER_SWITCHOVER
        self._limiter.set_rate(
            parameters.max_postcopy_bandwidth if after else parameters.max_bandwidth
        )

    def info(self) -> MigrationInfo:
        """The figures as they are now."""
        remaining = self._dirty.remaining_bytes if self._dirty is not None else 0
        rate = self._sender.rate if self._sender is not None else Rate()
        return describe(self._counters, rate, self._clock, self._progress.status, remaining)

    # --- the thread of the source

    def run(self) -> None:
        """Move the guest; whatever happens, leave it with exactly one owner."""
        try:
            self._set_up()
            self._move()
            self._finish()
            self._clock.ended = time.monotonic()
            self._progress.move(Status.COMPLETED)
        except PostcopyError as error:
            self._fail(error)
        finally:
            self._let_go()

    def _set_up(self) -> None:
        address = parse(self._wishes.uri)
        tracker = choose(self._parameters.x_dirty_tracking, self._guest)
        self._channel = channel = connect_unless_cancelled(address, self.orders)
        blocks = [RamBlock(region) for region in self._guest.regions()]
        self._counters.total_bytes = sum(block.size_bytes for block in blocks)
        self._dirty = DirtyPages(blocks, tracker)
        self._sender = PageSender(channel, self._limiter, self._counters)
        self._push = PostcopyPush(self._dirty, self._sender, self._counters, self.orders.interrupt)
        postcopy = self._wishes.capabilities.enabled(Capability.POSTCOPY_RAM)
        if postcopy and not channel.can_return:
            raise Refused(
                f"postcopy needs a channel that answers, which {channel.description} does not"
            )
        self._send_set_up(channel, blocks, postcopy=postcopy)
        self._dirty.start()
        self._on_pass(self._dirty.syncs)
        self._clock.set_up = time.monotonic()
        self._progress.move(Status.ACTIVE)

    def _send_set_up(self, channel: Channel, blocks: list[RamBlock], *, postcopy: bool) -> None:
        parts = [encoder.stream_start(Configuration(self._guest.machine_name))]
        if self._is_answered(channel, postcopy=postcopy):
            self._open_return_path(channel, blocks)
            greeting: list[CommandRecord] = [OpenReturnPath(), Ping(1), Ping(IDENTITY_PING)]
            parts += map(encode_command, greeting)
        if postcopy:
            sizes = 0
            for block in blocks:
                sizes |= block.page_size_bytes
            parts.append(encode_command(PostcopyAdvise(sizes, TARGET_PAGE_BYTES)))
        entries = (
            BlockEntry(
                block.name,
                block.size_bytes,
                block.page_size_bytes if block.target_pages_per_page > 1 and postcopy else None,
            )
            for block in blocks
        )
        parts.append(encoder.ram_setup(RamSetup(RAM_SECTION_ID, tuple(entries)), postcopy=postcopy))
        channel.send(b"".join(parts))

    def _is_answered(self, channel: Channel, *, postcopy: bool) -> bool:
        """Whether there is a return path; a command (``gzip > file``) has one only if it is said."""
        told = postcopy or self._wishes.capabilities.enabled(Capability.RETURN_PATH)
        return channel.can_return and (told or isinstance(channel, SocketChannel))

    def _open_return_path(self, channel: Channel, blocks: list[RamBlock]) -> None:
        assert self._push is not None
        layout = {b.name: BlockLayout(b.size_bytes, b.page_size_bytes) for b in blocks}
        self._return_path = ReturnPath(
            channel,
            ReturnPathDecoder(layout),
            self._push.serve,
            self._push.window.pong,
            self._push.window.close,
        )
        self._return_path.start()

    def _move(self) -> None:
        assert self._dirty is not None
        assert self._sender is not None
        precopy = Precopy(
            self._dirty,
            self._sender,
            self._counters,
            self.orders,
            lambda: self._parameters,
            self._on_pass,
        )
        outcome = precopy.run()
        if outcome is Outcome.CANCELLED:
            raise MigrationCancelled("cancelled by the user")
        switchover = self._make_switchover()
        switchover.stop_guest()
        self._sender.phase = "downtime_bytes"
        self._on_pass(self._dirty.syncs)
        if outcome is Outcome.SMALL_ENOUGH:
            switchover.complete_precopy()
        else:
            switchover.start_postcopy()
            self._progress.move(Status.POSTCOPY_ACTIVE)
            self._complete_postcopy()
        self._sender.count()

    def _make_switchover(self) -> Switchover:
        assert self._channel is not None
        assert self._dirty is not None
        assert self._sender is not None
        self._switchover = Switchover(
            self._guest,
            self._channel,
            self._return_path,
            self._dirty,
            self._sender,
            self.orders,
            self._progress,
            self._wishes.capabilities,
            self._counters,
            self._clock,
            self._describe_devices,
        )
        return self._switchover

    def _complete_postcopy(self) -> None:
        assert self._channel is not None
        assert self._sender is not None
        assert self._push is not None
        assert self._return_path is not None
        self._sender.count()
        self._sender.phase = "postcopy_bytes"
        self._limiter.set_rate(self._parameters.max_postcopy_bandwidth)
        # Should it not take the devices, nothing of ours lies unread between its last word and us.
        self._return_path.wait_pong(PACKAGE_PING)
        self._push.run()
        self._channel.send_many([self._sender.end_of_ram(), encoder.end_of_stream()])
        self._return_path.wait_shut()

    def _finish(self) -> None:
        """Close the channel: for a file or a command this is when it proves to have worked."""
        assert self._channel is not None
        assert self._dirty is not None
        self._dirty.stop()
        self._channel.close()

    # --- when something went wrong

    def _fail(self, error: PostcopyError) -> None:
        """Decide whose the guest is, and say so."""
        if isinstance(error, ChannelBroken) and self._return_path is not None:
            error = self._return_path.explain(error)
        cancelled = self._progress.status is Status.CANCELLING
        self.error = None if cancelled else error
        self._clock.ended = time.monotonic()
        never_ran_there = self._never_ran_there()
        if self._progress.status is Status.POSTCOPY_ACTIVE and not never_ran_there:
            self._progress.move(Status.POSTCOPY_PAUSED)
            return
        if self._dirty is not None:
            self._dirty.stop()
        switchover = self._switchover
        # Where nobody can answer (a file, a command) nobody runs the guest by itself either.
        refused = self._return_path is None or self._return_path.refused
        if switchover is not None and switchover.stopped:
            if not switchover.committed or refused or never_ran_there:
                self._guest.take_back()
                self._guest.resume()
            else:
                self.error = PostcopyError(
                    f"{error}; the destination may be running the guest, so it stays stopped here: "
                    "'cont' takes it back"
                )
        self._progress.move(Status.CANCELLED if cancelled else Status.FAILED)

    def _never_ran_there(self) -> bool:
        """Whether the destination has ended before the last thing in the package, which is RUN."""
        return (
            self._progress.status is Status.POSTCOPY_ACTIVE
            and self._return_path is not None
            and self._return_path.ended_before(PACKAGE_PING)
        )

    def _let_go(self) -> None:
        """Close what is open, unless it is needed for a recovery."""
        if self._push is not None:
            self._push.window.close()
        if self._channel is not None:
            self._channel.shutdown()
            try:
                self._channel.close()
            except PostcopyError:
                pass  # it was over already
        if self._progress.status is Status.POSTCOPY_PAUSED or self._dirty is None:
            return
        for pages in self._dirty.blocks:
            pages.block.close()
