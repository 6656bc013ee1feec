"""The messages of the destination, read by the thread ``return-path``.

The same thread serves page requests: a waiting vCPU must not wait for another thread as well.  Under a
bandwidth limit the pushing thread reads instead (:meth:`ReturnPath.read_messages`), since it would
otherwise hold the interpreter at the moment of a request.
"""

import threading
import time
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.errors import ChannelBroken, PostcopyError, StreamError
from postcopy.kernel import threads
from postcopy.kernel.borrowed_reader import BorrowedReader
from postcopy.kernel.threads import run_soon
from postcopy.memory.runs import Mask
from postcopy.stream.pings import is_ours
from postcopy.stream.records import (
    Pong,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    Shut,
    SwitchoverAck,
)
from postcopy.stream.return_path import ReturnPathDecoder

_LAST_MESSAGE_S = 1.0
_ITS_ERROR = "its own error says why"


class ReturnPath:
    """The messages of one destination.

    :param serve: sends requested pages: block, start and length in bytes.
    :param on_pong: called with the number of each pong.
    :param on_end: called when no message will come any more, and nothing can be sent.
    """

    def __init__(
        self,
        channel: Channel,
        decoder: ReturnPathDecoder,
        serve: Callable[[str, int, int], None],
        on_pong: Callable[[int], None],
        on_end: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._decoder = decoder
        self._serve = serve
        self._on_pong = on_pong
        self._on_end = on_end
        self._changed = threading.Condition()
        # Under `_changed`: what has come so far, and why no more will come.
        self._pongs: dict[int, float] = {}  # and when each was read, in monotonic seconds
        self._shut: int | None = None
        self._shut_s = 0.0
        self._end: PostcopyError | None = None
        self._bitmaps: dict[str, Mask] = {}
        self._resumed = False
        self.reader = BorrowedReader(*channel.input_fds)
        self._failure: PostcopyError | None = None  # of the thread that had borrowed the turn
        self._thread = threading.Thread(target=self.run, name="return-path", daemon=True)
        self.peer_is_ours = False
        self.acknowledged = False
        """Whether the destination has let us switch over (``SWITCHOVER_ACK``)."""

    def start(self) -> None:
        """Start the thread."""
        threads.start(self._thread)

    def join(self) -> None:
        """Wait until the thread has ended, once the channel has been closed or broken."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def run(self) -> None:
        """Handle messages until the destination has closed the return path, or the channel breaks."""
        run_soon()  # a vCPU may wait for a page
        try:
            self.reader.wait()
            while self._receive():
                self.reader.wait()
            end: PostcopyError = ChannelBroken(
                f"{self._channel.description}: the destination closed the connection; {_ITS_ERROR}"
            )
        except PostcopyError as error:
            end = error
            if isinstance(error.__cause__, ConnectionError):  # not ended by ourselves
                end = ChannelBroken(f"{error}: the destination is gone; {_ITS_ERROR}")
        self.reader.end()
        with self._changed:
            self._end = end
            self._changed.notify_all()
        if self._shut != 0:
            self._channel.shutdown()  # end the wait of a send: the peer is gone
        self._on_end()

    def read_messages(self, timeout_s: float | None = 0) -> bool:
        """Handle messages in place of the thread; for a caller that has borrowed its turn.

        The thread gets its turn back to handle an end of the return path.

        :param timeout_s: how long to wait for a message; None: without a bound.
        :return: whether a message has come; False as well if the thread reads itself.
        """
        if not self.reader.is_borrowed or not self.reader.is_readable(timeout_s):
            return False
        try:
            goes_on = self._receive()
        except PostcopyError as error:
            self._failure = error
            goes_on = False
        if not goes_on:
            self.reader.give_back(at_once=True)
        return True

    def wait_pong(self, *values: int) -> int:
        """Wait until the destination has answered a ping; return which of ``values``.

        :raises ChannelBroken: it will not any more. :raises StreamError: it has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pongs.keys() & set(values) or self._over)
            if not (found := self._pongs.keys() & set(values)):
                raise self._reason()
            return found.pop()

    def pong_s(self, value: int) -> float:
        """When a pong that has been waited for was read, in monotonic seconds."""
        return self._pongs[value]

    def answers_within(self, value: int, timeout_s: float) -> bool:
        """Whether the destination answers the ping in time; True as well if its return path has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: value in self._pongs or self._over, timeout_s)

    def wait_shut(self) -> float:
        """Wait until the destination has closed the return path (``SHUT``).

        :return: when that was read, in monotonic seconds: who waits may go on much later.
        :raises StreamError: the guest has not arrived.
        :raises ChannelBroken: the channel ended before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over)
            if self._shut != 0:
                raise self._reason()
            return self._shut_s

    def wait_bitmap(self, block: str) -> Mask:
        """Wait for the received-bitmap of a block: one bit a target page, set = received.

        :raises ChannelBroken: it will not come any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: block in self._bitmaps or self._over)
            if block not in self._bitmaps:
                raise self._reason()
            return self._bitmaps.pop(block)

    def wait_resume_ack(self) -> None:
        """Wait until the destination is ready to resume.

        :raises ChannelBroken: it will not be any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._resumed or self._over)
            if not self._resumed:
                raise self._reason()

    def explain(self, error: ChannelBroken) -> PostcopyError:
        """Return why a send failed, as far as the destination has told.

        Its last message may still be on its way; a broken channel ends soon.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over, _LAST_MESSAGE_S)
            return self._reason() if self._over else error

    def has_ended(self) -> bool:
        """Whether no message will come any more."""
        return self._over

    @property
    def refused(self) -> bool:
        """Whether the destination has reported that it did not take the guest."""
        return bool(self._shut)

    @property
    def _over(self) -> bool:
        return self._shut is not None or self._end is not None

    def _reason(self) -> PostcopyError:
        if self._shut:
            return StreamError(f"the destination could not take the guest; {_ITS_ERROR}")
        return self._end or ChannelBroken("the return path has ended")

    def _receive(self) -> bool:
        """Handle the messages that have come; return whether more may come."""
        if self._failure is not None:
            raise self._failure
        if self._shut is not None:
            return False
        count = self._channel.receive_ready_into(self._decoder.buffer())
        if count is None:
            return True
        if not count:
            return False
        self._decoder.received(count)
        while (message := self._decoder.next_message()) is not None:
            self._handle(message)
        return self._shut is None

    def _handle(self, message: object) -> None:
        now_s = time.monotonic()
        if isinstance(message, RequestPages):
            assert message.block is not None  # the decoder has filled it in
            self._serve(message.block, message.start, message.length_bytes)
        elif isinstance(message, SwitchoverAck):
            self.acknowledged = True
        elif isinstance(message, Pong):
            self.peer_is_ours |= is_ours(message.value)
            self._on_pong(message.value)
            with self._changed:
                self._pongs[message.value] = now_s
                self._changed.notify_all()
        elif isinstance(message, Shut):
            with self._changed:
                self._shut, self._shut_s = message.value, now_s
                self._changed.notify_all()
        elif isinstance(message, RecvBitmapReply):
            with self._changed:
                self._bitmaps[message.block] = message.bitmap
                self._changed.notify_all()
        elif isinstance(message, ResumeAck):
            with self._changed:
                self._resumed = True
                self._changed.notify_all()
