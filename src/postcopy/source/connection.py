"""One connection to the destination, and everything that lives and ends with it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from postcopy.channel.channel import Channel
from postcopy.channel.silence import SilenceWatch, Taken
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.page_sink import PageSink
from postcopy.source.postcopy import PostcopyPush
from postcopy.source.preempt_channel import PreemptChannel
from postcopy.source.return_path import ReturnPath
from postcopy.stream.commands import encode_command
from postcopy.stream.layout import BlockLayout
from postcopy.stream.pings import (
    ALL_SENT_PING,
    KEEPALIVE_PING,
    PREEMPT_CHECK_PINGS,
    PREEMPT_PROBE_PING,
    answer,
    needs_nothing,
)
from postcopy.stream.records import Ping
from postcopy.stream.return_path import ReturnPathDecoder
from postcopy.trace import trace

_GREETING_S = 5.0
"""In which a destination answers unless it waits for the second connection.

One that is only slow takes an early second connection as well: it accepts the first one first.
"""


class Connection:
    """A channel with its sender, its push and its return path, and perhaps one for urgent pages.

    A recovery makes another one; nothing of the old is used again but the pages it shares.

    :param sender: brings pages out on this channel.
    :param interrupt: set when the connection ends, for a sender that keeps to a bandwidth limit.
    :param timeout_ms: how long the destination may be silent, 0 = as long as it likes; may change.
    :param answered: whether the destination can, and is going to, answer on the channel.
    """

    def __init__(
        self,
        channel: Channel,
        dirty: DirtyPages,
        sender: PageSink,
        counters: Counters,
        interrupt: threading.Event,
        timeout_ms: Callable[[], int],
        *,
        answered: bool,
    ) -> None:
        self.channel = channel
        self._counters = counters
        self._preempt: PreemptChannel | None = None
        self._silence: SilenceWatch | None = None
        self._taken = Taken(channel)
        self._timeout_ms = timeout_ms
        self._cause: PostcopyError | None = None
        self.sender = sender
        self.push = PostcopyPush(dirty, self.sender, counters)
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
            self.push.answers = self.return_path
            self.return_path.start()

    @property
    def answers(self) -> ReturnPath:
        """The return path of a connection that must have one."""
        assert self.return_path is not None
        return self.return_path

    # --- the second connection

    def wants_both(self) -> bool:
        """Whether the destination waits for the second connection before it reads this one.

        As QEMU 7.1 and 7.2 do it; they say so by their silence alone.
        """
        self.channel.send(encode_command(Ping(PREEMPT_PROBE_PING)))
        return not self.answers.answers_within(PREEMPT_PROBE_PING, _GREETING_S)

    @property
    def has_preempt(self) -> bool:
        """Whether there is a second connection."""
        return self._preempt is not None

    def open_preempt(self, channel: Channel, *, says_end: bool) -> None:
        """Send requested pages over this channel from now on (postcopy-preempt)."""
        self._preempt = PreemptChannel(channel, self._counters, self._break_off, says_end=says_end)
        self._preempt.start()
        self.push.use_preempt_channel(self._preempt)

    def check_preempt(self) -> None:
        """Give the destination the time to close a second connection that it does not want.

        Two pings: it cannot come to the second before it has looked at its listener.

        :raises ChannelBroken: it has.
        """
        for ping in PREEMPT_CHECK_PINGS:
            self.channel.send(encode_command(Ping(ping)))
            self.answers.wait_pong(ping)
        if self._cause is not None:
            raise self._cause

    # --- a peer that falls silent

    def begin_watch(self) -> None:
        """Break the connection when the destination does nothing for too long.

        It is pinged while it has nothing to say.  That it takes pages is a sign of life as well: on
        a slow network an answer takes its time.
        """
        self._watch(self._ask_for_life)

    def expect_last_word(self) -> None:
        """The same from here to the end: behind the end of the stream there must be no ping.

        :raises ChannelBroken: the destination has been silent for too long already.
        """
        if self._silence is not None:
            self._silence.stop()
        if self._cause is not None:
            raise self._cause
        self._watch(lambda: True)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Break the connection when what is sent meanwhile is not taken: for a peer that never answers."""
        self._watch(lambda: self.channel.pending_output() > 0)
        try:
            yield
        finally:
            assert self._silence is not None
            self._silence.stop()

    def _watch(self, waiting: Callable[[], bool]) -> None:
        self._silence = SilenceWatch(self._timeout_ms, self._signs, waiting, self._silent)
        self._silence.start()

    def _signs(self) -> tuple[int, int, int]:
        preempt = self._preempt.taken_bytes if self._preempt is not None else 0
        return self.channel.received_bytes, self._taken.of(self.sender.sent_bytes), preempt

    def _ask_for_life(self) -> bool:
        try:
            self.channel.send_if_idle(encode_command(Ping(KEEPALIVE_PING)))
        except ChannelBroken:
            pass  # who uses the channel will see
        return True

    def _silent(self, seconds: float) -> None:
        self._break_off(
            ChannelBroken(
                f"{self.channel.description}: no sign of life from the destination for {seconds:g} s"
            )
        )

    # --- the end

    def explain(self, error: PostcopyError) -> PostcopyError:
        """Why it broke, as far as is known on this side."""
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

        While it may be pinged: should it be gone, that is noticed before nothing but the end is left.

        :return: whether no page is missing there any more, and it needs nothing of us to complete.
            One that is not ours only says that it has read all that the main channel brought.
        """
        if self._preempt is not None:
            self._preempt.expect_end()
        self.channel.send(encode_command(Ping(ALL_SENT_PING)))
        return needs_nothing(self.answers.wait_pong(ALL_SENT_PING, answer(ALL_SENT_PING)))

    def end(self, last_words: list[bytes]) -> None:
        """Send the end of the stream, and wait for the destination's last word.

        The second connection stays open until then, as QEMU does it.

        :raises ChannelBroken: it does not come.
        """
        self.expect_last_word()
        self.channel.send_many(last_words)
        trace("source.pages-ended")
        self.answers.wait_shut()

    def shutdown(self) -> None:
        """Break it, from any thread; whoever uses it will notice."""
        self.channel.shutdown()
        if self._preempt is not None:
            self._preempt.shutdown()

    def finish(self) -> None:
        """Close it in order: for a file or a command this is when it proves to have worked.

        Where the destination answers, its last word has proved that.
        """
        if self._preempt is not None:
            self._preempt.close()
        if self.return_path is not None:
            self.channel.delivered()
        self.channel.close()

    def abandon(self) -> None:
        """Break it; on return no thread of it touches a page any more.  Harmless when finished."""
        self.push.stop()
        self.channel.shutdown()
        if self._silence is not None:
            self._silence.stop()
        if self._preempt is not None:
            self._preempt.close()
        if self.return_path is not None:
            self.return_path.join()
        try:
            self.channel.close()
        except PostcopyError:
            pass  # it was over already

    def _wake_senders(self) -> None:
        """Nothing can be sent any more: nobody is to sleep for the bandwidth limit first."""
        self.push.stop()
        self._interrupt.set()

    def _break_off(self, cause: PostcopyError) -> None:
        """Break all of it from a thread that has seen why; the source's own thread will notice."""
        self._cause = self._cause or cause
        self.shutdown()
