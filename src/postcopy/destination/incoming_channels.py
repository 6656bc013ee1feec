"""Accepts the connections of one source: first the main channel, then the preempt channel.

A source sends no header on the preempt channel, so only the order tells the two apart, as in QEMU.  Every
other connection is closed.
"""

import sys
import threading
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.channel.listen import Listener
from postcopy.errors import ChannelBroken, HostCannot, PostcopyError, StreamError
from postcopy.kernel import threads


class IncomingChannels:
    """Takes over a listener.

    :param preempt_wanted: whether a preempt channel is expected; asked at each further connection.
    """

    def __init__(self, listener: Listener, preempt_wanted: Callable[[], bool]) -> None:
        self._listener = listener
        self._preempt_wanted = preempt_wanted
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Under `_changed`: the preempt channel, until :meth:`preempt` returns it.
        self._preempt: Channel | None = None
        self._had_preempt = False
        self._closed = False
        self._failure: PostcopyError | None = None

    def main(self) -> Channel:
        """Wait for the main channel.

        :raises ChannelBroken: :meth:`close` has been called.
        :raises HostCannot: there can be no more threads.
        """
        channel = self._listener.accept()
        thread = threading.Thread(target=self._run, name="accept", daemon=True)
        try:
            self._thread = threads.start(thread)  # from here `close` may wait for its end
        except HostCannot:
            channel.close()
            raise
        return channel

    def preempt(self, timeout_s: float) -> Channel:
        """Wait for the preempt channel.

        :raises StreamError: the source has not connected within the time.
        :raises ChannelBroken: :meth:`give_up` or :meth:`close` has been called.
        :raises KernelError: no connection can be accepted.
        """
        with self._changed:
            self._changed.wait_for(self._is_settled, timeout_s)
            channel, self._preempt = self._preempt, None
            if channel is not None:
                return channel
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise ChannelBroken("no longer waiting for the preempt channel")
        raise StreamError(
            f"the source opened no second connection within {timeout_s:g} s; "
            "switch postcopy-preempt on there too, or off here"
        )

    def _is_settled(self) -> bool:
        return self._preempt is not None or self._closed or self._failure is not None

    def give_up(self) -> None:
        """Wait for the preempt channel no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop listening.  Any number of times, from any thread."""
        self.give_up()
        self._listener.close()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            untaken, self._preempt = self._preempt, None
        if untaken is not None:
            untaken.close()

    def _run(self) -> None:
        try:
            while True:
                self._sort(self._listener.accept())
        except ChannelBroken:
            pass  # closed
        except PostcopyError as error:
            with self._changed:
                self._failure = error  # for a thread that waits for the preempt channel
                self._changed.notify_all()

    def _sort(self, channel: Channel) -> None:
        with self._changed:
            if self._preempt_wanted() and not self._had_preempt and not self._closed:
                self._preempt = channel
                self._had_preempt = True
                self._changed.notify_all()
                return
        sys.stderr.write("postcopy: Extra incoming migration connection; ignoring\n")
        channel.close()
