"""One connection to the destination, and all that is made and closed with it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from postcopy.channel.address import Address
from postcopy.channel.channel import Channel
from postcopy.channel.peer_timeout import AckedBytes, PeerTimeout
from postcopy.errors import ChannelBroken, PostcopyError, StreamError
from postcopy.multifd.sender import MultifdSender
from postcopy.source.connector import Connector
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.flow_control import PushPolicy
from postcopy.source.page_sink import PageSink
from postcopy.source.preempt_channel import PreemptChannel
from postcopy.source.push import PostcopyPush
from postcopy.source.return_path import ReturnPath
from postcopy.stream.commands import encode_command
from postcopy.stream.layout import BlockLayout
from postcopy.stream.pings import (
    ALL_SENT_PING,
    HEADER_PING,
    IDENTITY_PING,
    KEEPALIVE_PING,
    PREEMPT_CHECK_PINGS,
    PREEMPT_PROBE_PING,
    answer,
    needs_nothing,
)
from postcopy.stream.records import Ping, PostcopyResume, RecvBitmap
from postcopy.stream.return_path import ReturnPathDecoder
from postcopy.trace import trace

_PROBE_S = 5.0
"""A destination that has not answered by then waits for the second connection.

A slow one takes an early second connection as well: it accepts the first one first.
"""


class Connection:
    """A channel with its sink, its push and its return path, and with a preempt channel if there is one.

    A recovery makes another connection, which shares nothing with this one but the pages.

    :param sender: the sink of this channel.
    :param interrupt: set when the connection ends: ends a wait for the bandwidth limit.
    :param timeout_ms: how long the destination may be silent, 0 = without a bound; may change.
    :param multifd: the channels beside it; they become the connection's.
    :param answered: whether the destination answers on the channel.
    """

    def __init__(
        self,
        channel: Channel,
        dirty: DirtyPages,
        sender: PageSink,
        counters: Counters,
        policy: PushPolicy,
        interrupt: threading.Event,
        timeout_ms: Callable[[], int],
        multifd: MultifdSender | None = None,
        *,
        answered: bool,
    ) -> None:
        self._finishing = False  # everything has been sent
        self.channel = channel
        self._counters = counters
        self._preempt: PreemptChannel | None = None
        self._peer_timeout: PeerTimeout | None = None
        self._acked = AckedBytes(channel)
        self._timeout_ms = timeout_ms
        self._cause: PostcopyError | None = None
        self.sender = sender
        self._multifd = multifd
        if multifd is not None:
            multifd.on_failure = self._break_off
        self.push = PostcopyPush(dirty, sender, counters, policy)
        self._interrupt = interrupt
        self.return_path: ReturnPath | None = None
        if answered:
            layout = {
                pages.block.name: BlockLayout(pages.block.size_bytes, pages.block.page_size_bytes)
                for pages in dirty.blocks
            }
            self.return_path = ReturnPath(
                channel,
                ReturnPathDecoder(layout),
                self.push.serve,
                self.push.window.pong,
                self._wake_senders,
            )
            self.return_path.start()

    @property
    def answers(self) -> ReturnPath:
        """The return path of a connection that must have one."""
        assert self.return_path is not None
        return self.return_path

    def wait_until_let_in(self, *, acknowledged: bool) -> None:
        """Wait until an encrypted destination has answered, if it can, after the header has been sent.

        In TLS 1.3 it may refuse this side's certificate after this side's handshake has ended.

        :param acknowledged: it must let us switch over (``switchover-ack`` as QEMU had it before 11.1).  It
            counts its own devices that have something to get ready.  Ours have nothing, and so it
            does it before it answers.
        :raises ChannelBroken: it has closed the connection.
        :raises StreamError: it has not let us switch over.
        """
        if self.return_path is None or not (acknowledged or self.channel.encrypted):
            return
        self.return_path.wait_pong(HEADER_PING)
        if acknowledged and not self.return_path.acknowledged:
            raise StreamError(
                "the destination does not acknowledge the switchover as QEMU did before 11.1; switch "
                "switchover-ack and x-switchover-ack-legacy on there too, or the latter off here"
            )

    # --- the channels of multifd

    def open_multifd(self, connector: Connector, address: Address, count: int) -> None:
        """Open all of them, if there are to be any: a QEMU reads nothing of any channel before."""
        if self._multifd is not None:
            for _ in range(count):
                self._multifd.add(self.connect_beside(connector, address))

    def connect_beside(self, connector: Connector, address: Address) -> Channel:
        """Open one more channel, unless this connection ends meanwhile; it is the caller's."""
        ended = self.answers.has_ended if self.return_path is not None else lambda: False
        channel = connector.connect(address, ended)
        channel.watch(self._timeout_ms() / 1000)
        return channel

    # --- the second connection

    def reads_after_both(self) -> bool:
        """Whether the destination reads nothing before the second connection is there.

        QEMU 7.1 and 7.2 do; only their silence tells.
        """
        self.channel.send(encode_command(Ping(PREEMPT_PROBE_PING)))
        return not self.answers.answers_within(PREEMPT_PROBE_PING, _PROBE_S)

    @property
    def has_preempt(self) -> bool:
        """Whether there is a second connection."""
        return self._preempt is not None

    def open_preempt(self, channel: Channel, *, sends_end: bool) -> None:
        """Send requested pages over this channel from now on (postcopy-preempt)."""
        self._preempt = PreemptChannel(
            channel, self._counters, self._break_off, sends_end=sends_end
        )
        self._preempt.start()
        self.push.use_preempt_channel(self._preempt)

    def check_preempt(self) -> None:
        """Wait until the destination would have closed a second connection that it does not want.

        Two pings: the destination accepts or closes the connection before it answers the second.

        :raises ChannelBroken: it has.
        """
        for ping in PREEMPT_CHECK_PINGS:
            self.channel.send(encode_command(Ping(ping)))
            self.answers.wait_pong(ping)
        if self._cause is not None:
            raise self._cause

    # --- a recovery

    def resume(self, dirty: DirtyPages, open_preempt: Callable[[], None]) -> None:
        """Resume a broken postcopy: find out which pages the destination lacks.

        Source: QEMU's ``docs/devel/migration/postcopy.rst``, "Postcopy Recovery".  The destination sends
        the received-bitmap of each block; all other pages are pending again.

        :param open_preempt: opens the second connection, if there is one; QEMU opens it at this point.
        :raises ChannelBroken: this connection has broken as well; another recovery may follow.
        :raises StreamError: the peer is not the destination of this migration.
        """
        for pages in dirty.blocks:
            self.channel.send(encode_command(RecvBitmap(pages.block.name)))
            trace("source.bitmap-asked")
            pages.keep_missing(self.answers.wait_bitmap(pages.block.name))
            trace("source.bitmap-taken")
        open_preempt()
        self.channel.send(encode_command(PostcopyResume()))
        trace("source.resume-sent")
        self.answers.wait_resume_ack()
        trace("source.resume-acknowledged")

    def ask_identity(self) -> None:
        """Find out whether the destination is one of ours, which a recovery does not tell."""
        self.channel.send(encode_command(Ping(IDENTITY_PING)))
        self.answers.wait_pong(IDENTITY_PING, answer(IDENTITY_PING))

    # --- a peer that falls silent

    def begin_watch(self) -> None:
        """Break the connection when the destination shows no sign of life for too long.

        It is pinged while nothing else is sent.  Bytes that it takes are a sign of life as well: on a slow
        network an answer is late.
        """
        self._watch(self._ask_for_life)

    def watch_without_pings(self) -> None:
        """As :meth:`begin_watch`, without pings: none may follow the end of the stream.

        :raises ChannelBroken: the destination has been silent for too long already.
        """
        if self._peer_timeout is not None:
            self._peer_timeout.stop()
        if self._cause is not None:
            raise self._cause
        self._watch(lambda: True)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Break the connection when the peer, which never answers, takes nothing for too long."""
        self._watch(lambda: self.channel.pending_output() > 0)
        try:
            yield
        finally:
            assert self._peer_timeout is not None
            self._peer_timeout.stop()

    def _watch(self, waiting: Callable[[], bool]) -> None:
        self._peer_timeout = PeerTimeout(self._timeout_ms, self._signs, waiting, self._silent)
        self._peer_timeout.start()

    def _signs(self) -> tuple[int, int, int]:
        beside = self._preempt.taken_bytes if self._preempt is not None else 0
        beside += self._multifd.taken_bytes if self._multifd is not None else 0
        return self.channel.received_bytes, self._acked.of(self.sender.sent_bytes), beside

    def _ask_for_life(self) -> bool:
        try:
            self.channel.send_if_idle(encode_command(Ping(KEEPALIVE_PING)))
        except ChannelBroken:
            pass  # the thread that sends or receives raises it
        return True

    def _silent(self, seconds: float) -> None:
        self._break_off(
            ChannelBroken(
                f"{self.channel.description}: no sign of life from the destination for {seconds:g} s"
            )
        )

    # --- the end

    def explain(self, error: PostcopyError) -> PostcopyError:
        """Return why the connection broke, as far as this side knows."""
        if not isinstance(error, ChannelBroken):
            return error
        if self.return_path is not None:
            error = self.return_path.explain(error)
        return error if self._cause is None or self.refused else self._cause

    @property
    def refused(self) -> bool:
        """Whether the destination has said that it does not run the guest."""
        return self.return_path is not None and self.return_path.refused

    def wait_until_taken(self) -> bool:
        """Wait until the destination has taken all that was pushed.

        It may be pinged until then, so a break is noticed before only the end of the stream is left.

        :return: whether no page is missing there, so that it completes by itself.  A real QEMU only says
            that it has read all of the main channel.
        """
        if self._preempt is not None:
            self._preempt.expect_end()
        self.channel.send(encode_command(Ping(ALL_SENT_PING)))
        return needs_nothing(self.answers.wait_pong(ALL_SENT_PING, answer(ALL_SENT_PING)))

    def end(self, last: list[bytes]) -> None:
        """Send the end of the stream, and wait until the destination has closed the return path (``SHUT``).

        The second connection stays open until then, as with QEMU.

        :raises ChannelBroken: it has not said so.
        """
        self.watch_without_pings()
        self.channel.send_many(last)
        trace("source.pages-ended")
        self.answers.wait_shut()

    def shutdown(self) -> None:
        """Break it, from any thread; sends and receives on it raise."""
        self.channel.shutdown()
        if self._multifd is not None:
            self._multifd.shutdown()
        if self._preempt is not None:
            self._preempt.shutdown()

    def finish(self) -> None:
        """Close it in order: a file or a command reports its errors here.

        A destination with a return path has reported its result already.
        """
        if self._multifd is not None:
            self._multifd.close()
        if self._preempt is not None:
            self._preempt.close()
        if self.return_path is not None:
            self.channel.delivered()
        self._finishing = True
        self.channel.close()

    def end_command(self) -> bool:
        """End a command that goes on although it has been sent everything.

        :return: whether there is one.
        """
        return self._finishing and self.channel.leave()

    def abandon(self) -> None:
        """Break it; on return no thread of it touches a page any more.  Harmless when finished."""
        self.push.stop()
        self.channel.shutdown()
        if self._peer_timeout is not None:
            self._peer_timeout.stop()
        if self._multifd is not None:
            self._multifd.shutdown()
            self._multifd.close()
        self.sender.abandon()
        if self._preempt is not None:
            self._preempt.close()
        if self.return_path is not None:
            self.return_path.join()
        try:
            self.channel.close()
        except PostcopyError:
            pass  # it was over already

    def _wake_senders(self) -> None:
        """End all waits of senders: nothing can be sent any more."""
        self.push.stop()
        self._interrupt.set()

    def _break_off(self, cause: PostcopyError) -> None:
        """Break all of it, from a thread that knows why; the thread ``source`` raises the cause."""
        self._cause = self._cause or cause
        self.shutdown()
