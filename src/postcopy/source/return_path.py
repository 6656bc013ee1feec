"""What the destination says: the thread ``return-path`` reads it.

Page requests are served from this very thread, so that no hand-over between threads stands between a
vCPU that waits and its page.  While the push has to wait for its bandwidth limit, its thread reads instead
(:meth:`ReturnPath.look`): it would have the interpreter just when a page is asked for.
"""

import threading
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.errors import ChannelBroken, PostcopyError, StreamError
from postcopy.kernel import threads
from postcopy.kernel.reading import ReadingTurn
from postcopy.kernel.scheduling import run_soon
from postcopy.memory.runs import Mask
from postcopy.stream.pings import is_ours
from postcopy.stream.records import Pong, RecvBitmapReply, RequestPages, ResumeAck, Shut
from postcopy.stream.return_path import ReturnPathDecoder

_LAST_WORD_S = 1.0
_ITS_ERROR = "its own error says why"


class ReturnPath:
    """The answers of one destination.

    :param serve: sends pages that are asked for: block, start and length in bytes.
    :param on_pong: told of every pong.
    :param on_end: called when nothing more will come, and nothing can be sent any more.
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
        # Under `_changed`: what has been said so far, and why nothing more will come.
        self._pongs: set[int] = set()
        self._shut: int | None = None
        self._end: PostcopyError | None = None
        self._bitmaps: dict[str, Mask] = {}
        self._resumed = False
        self.turn = ReadingTurn(*channel.input_fds)
        self._failure: PostcopyError | None = None  # met by who had borrowed the turn
        self._thread = threading.Thread(target=self.run, name="return-path", daemon=True)
        self.peer_is_ours = False

    def start(self) -> None:
        """Begin to listen."""
        threads.start(self._thread)

    def join(self) -> None:
        """Wait until no more messages are taken: the channel has been closed or broken."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def run(self) -> None:
        """Take messages until the destination has had its last word, or the channel breaks."""
        run_soon()  # a page may be asked for
        try:
            self.turn.wait()
            while self._receive():
                self.turn.wait()
            end: PostcopyError = ChannelBroken(
                f"{self._channel.description}: the destination closed the connection; {_ITS_ERROR}"
            )
        except PostcopyError as error:
            end = error
            if isinstance(error.__cause__, ConnectionError):  # not ended by ourselves
                end = ChannelBroken(f"{error}: the destination is gone; {_ITS_ERROR}")
        self.turn.end()
        with self._changed:
            self._end = end
            self._changed.notify_all()
        if self._shut != 0:
            self._channel.shutdown()  # wake a sender that waits for a peer who is gone
        self._on_end()

    def look(self, timeout_s: float | None = 0) -> bool:
        """Take what the destination says, in place of the thread; for who has borrowed its turn.

        What ends the return path is left to the thread, which gets its turn back.

        :param timeout_s: how long to wait for a message; None: as long as it takes.
        :return: whether anything has come; False as well if the thread reads itself.
        """
        if not self.turn.is_borrowed or not self.turn.is_readable(timeout_s):
            return False
        try:
            goes_on = self._receive()
        except PostcopyError as error:
            self._failure = error
            goes_on = False
        if not goes_on:
            self.turn.give_back(at_once=True)
        return True

    def wait_pong(self, *values: int) -> int:
        """Wait until the destination has come to our ping; return which of ``values`` it answered.

        :raises ChannelBroken: it never will; StreamError: it says that it failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pongs.intersection(values) or self._over)
            if not (found := self._pongs.intersection(values)):
                raise self._reason()
            return found.pop()

    def answers_within(self, value: int, timeout_s: float) -> bool:
        """Whether the destination comes to our ping in time; one that never will is no late one."""
        with self._changed:
            return self._changed.wait_for(lambda: value in self._pongs or self._over, timeout_s)

    def wait_shut(self) -> None:
        """Wait for the destination's last word.

        :raises StreamError: it says that the guest has not arrived.
        :raises ChannelBroken: it says nothing any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over)
            if self._shut != 0:
                raise self._reason()

    def wait_bitmap(self, block: str) -> Mask:
        """Wait for the received-bitmap of a block: one bit a target page, set = received.

        :raises ChannelBroken: it does not come any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: block in self._bitmaps or self._over)
            if block not in self._bitmaps:
                raise self._reason()
            return self._bitmaps.pop(block)

    def wait_resume_ack(self) -> None:
        """Wait until the destination is ready to go on.

        :raises ChannelBroken: it never will be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._resumed or self._over)
            if not self._resumed:
                raise self._reason()

    def explain(self, error: ChannelBroken) -> PostcopyError:
        """Why a send failed: what the destination has said or done, which the send cannot know.

        Its last word may still be on its way to us; a broken channel ends soon, though.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over, _LAST_WORD_S)
            return self._reason() if self._over else error

    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._over

    @property
    def refused(self) -> bool:
        """Whether the destination has said that it did not take the guest."""
        return bool(self._shut)

    @property
    def _over(self) -> bool:
        return self._shut is not None or self._end is not None

    def _reason(self) -> PostcopyError:
        if self._shut:
            return StreamError(f"the destination could not take the guest; {_ITS_ERROR}")
        return self._end or ChannelBroken("the return path has ended")

    def _receive(self) -> bool:
        """Take what has come; return whether more may come."""
        if self._failure is not None:
            raise self._failure
        if self._shut is not None:
            return False
        if not (count := self._channel.receive_into(self._decoder.buffer())):
            return False
        self._decoder.received(count)
        while (message := self._decoder.next_message()) is not None:
            self._take(message)
        return self._shut is None

    def _take(self, message: object) -> None:
        if isinstance(message, RequestPages):
            assert message.block is not None  # the decoder has filled it in
            self._serve(message.block, message.start, message.length_bytes)
        elif isinstance(message, Pong):
            self.peer_is_ours |= is_ours(message.value)
            self._on_pong(message.value)
            with self._changed:
                self._pongs.add(message.value)
                self._changed.notify_all()
        elif isinstance(message, Shut):
            with self._changed:
                self._shut = message.value
                self._changed.notify_all()
        elif isinstance(message, RecvBitmapReply):
            with self._changed:
                self._bitmaps[message.block] = message.bitmap
                self._changed.notify_all()
        elif isinstance(message, ResumeAck):
            with self._changed:
                self._resumed = True
                self._changed.notify_all()
