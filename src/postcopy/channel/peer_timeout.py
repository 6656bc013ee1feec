"""Detects a peer that does nothing any more, on any kind of channel.

The kernel does so for TCP (:meth:`postcopy.channel.channel.Channel.watch`), but not for a Unix socket, and
not for a peer whose host still answers while its process does nothing.
"""

import threading
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.kernel import threads

_TICKS = 10
_IDLE_S = 0.5


class AckedBytes:
    """How many of the sent bytes a peer has taken; never decreases.

    A Unix socket counts pending bytes with the kernel's own overhead.  Without the maximum kept here, each
    send would look as if the peer had taken something.
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


class PeerTimeout:
    """A thread that checks for signs of life ten times in each ``timeout_ms()``.

    It counts its checks, not the time: a process that was stopped itself for long finds no silence.

    :param timeout_ms: how long the peer may do nothing, read before each check; 0: without a bound.
    :param signs: any value that changes whenever the peer does something.
    :param waiting: whether the peer has something to do; its silence counts only then.
    :param on_silence: called once, with the seconds, when the time is over.
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
