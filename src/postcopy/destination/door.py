"""Where the connections of one source come in: the main channel first, then the one for urgent pages.

Nothing is said on the second (``postcopy-preempt``), so it is known by its order alone, as in QEMU.
Whoever comes besides is turned away.
"""

import sys
import threading
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.channel.listen import Listener
from postcopy.errors import ChannelBroken, HostCannot, PostcopyError, StreamError
from postcopy.kernel import threads


class Door:
    """Takes over a listener.

    :param urgent_wanted: whether a second connection is expected, asked when one comes.
    """

    def __init__(self, listener: Listener, urgent_wanted: Callable[[], bool]) -> None:
        self._listener = listener
        self._urgent_wanted = urgent_wanted
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Under `_changed`: the second connection, until it is fetched.
        self._urgent: Channel | None = None
        self._had_urgent = False
        self._closed = False
        self._failure: PostcopyError | None = None

    def main(self) -> Channel:
        """Wait for the main channel.

        :raises ChannelBroken: the door has been closed.
        :raises HostCannot: there can be no more threads.
        """
        channel = self._listener.accept()
        thread = threading.Thread(target=self._run, name="door", daemon=True)
        try:
            self._thread = threads.start(thread)  # from here `close` may wait for its end
        except HostCannot:
            channel.close()
            raise
        return channel

    def urgent(self, timeout_s: float) -> Channel:
        """Wait for the second connection.

        :raises StreamError: nobody has come for so long.
        :raises ChannelBroken: the door has been closed.
        :raises KernelError: no connection can be taken.
        """
        with self._changed:
            self._changed.wait_for(self._is_settled, timeout_s)
            channel, self._urgent = self._urgent, None
            if channel is not None:
                return channel
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise ChannelBroken("no longer waiting for the channel of urgent pages")
        raise StreamError(
            f"the source opened no second connection within {timeout_s:g} s; "
            "switch postcopy-preempt on there too, or off here"
        )

    def _is_settled(self) -> bool:
        return self._urgent is not None or self._closed or self._failure is not None

    def give_up(self) -> None:
        """Wait for the second connection no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more.  Any number of times, from any thread."""
        self.give_up()
        self._listener.close()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            untaken, self._urgent = self._urgent, None
        if untaken is not None:
            untaken.close()

    def _run(self) -> None:
        try:
            while True:
                self._let_in(self._listener.accept())
        except ChannelBroken:
            pass  # closed
        except PostcopyError as error:
            with self._changed:
                self._failure = error  # which matters to who waits for somebody
                self._changed.notify_all()

    def _let_in(self, channel: Channel) -> None:
        with self._changed:
            if self._urgent_wanted() and not self._had_urgent and not self._closed:
                self._urgent = channel
                self._had_urgent = True
                self._changed.notify_all()
                return
        sys.stderr.write("postcopy: Extra incoming migration connection; ignoring\n")
        channel.close()
