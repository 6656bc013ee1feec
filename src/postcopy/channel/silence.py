"""Notice that a peer has fallen silent, whatever kind of channel it is on.

The kernel watches over TCP (:meth:`postcopy.channel.channel.Channel.watch`), but not over a Unix socket,
and a peer whose host answers while its process does not is none of its business.
"""

import threading
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.kernel import threads

_TICKS = 10
_IDLE_S = 0.5


class Taken:
    """How much of what was sent a peer has taken; it never becomes less.

    What is still pending a Unix socket counts with the kernel's own overhead: taken at its word, each
    send would look as if the peer had done something.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._most_bytes = 0

    def of(self, sent_bytes: int) -> int:
        """As far as is known, in bytes.

        :param sent_bytes: what has been sent on the channel by now, or what counts of it.
        """
        taken_bytes = sent_bytes - self._channel.pending_output()
        self._most_bytes = max(self._most_bytes, taken_bytes)
        return self._most_bytes


class SilenceWatch:
    """A thread that looks for signs of life ten times in each ``timeout_ms()``.

    It counts its own looks, not the time: a process that was itself stopped for long finds no silence.

    :param timeout_ms: how much silence is too much; asked each time, 0 = as much as you like.
    :param signs: anything that changes whenever the peer does something.
    :param waiting: whether the peer is to do something; where it is not, silence is all right.
    :param on_silence: called once, with the seconds, when there has been too much of it.
    """

    def __init__(
        self,
        timeout_ms: Callable[[], int],
        signs: Callable[[], object],
        waiting: Callable[[], bool],
        on_silence: Callable[[float], None],
    ) -> None:
        self._timeout_ms = timeout_ms
        self._signs = signs
        self._waiting = waiting
        self._on_silence = on_silence
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="silence", daemon=True)

    def start(self) -> None:
        """Begin to watch.

        :raises HostCannot: there can be no more threads.
        """
        threads.start(self._thread)

    def stop(self) -> None:
        """Watch no longer; on return nothing more is called.  Any number of times."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        silent_ticks, last = 0, self._signs()
        while not self._stopped.wait(self._tick_s()):
            timeout_ms, now = self._timeout_ms(), self._signs()
            if not timeout_ms or now != last or not self._waiting():
                silent_ticks, last = 0, now
                continue
            silent_ticks += 1
            if silent_ticks >= _TICKS - 1:  # the silence began up to one tick before we noticed
                self._on_silence(timeout_ms / 1000)
                return

    def _tick_s(self) -> float:
        return self._timeout_ms() / 1000 / _TICKS or _IDLE_S
