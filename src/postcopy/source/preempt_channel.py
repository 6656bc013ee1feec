"""The preempt channel: requested pages have a connection of their own (``postcopy-preempt``).

Source: QEMU's ``docs/devel/migration/postcopy.rst``, "Postcopy preempt mode".  It is a second connection to
the address of the first, opened before the guest stops.  RAM records travel on it and nothing else: no
header, no sections, no end.  Nothing comes back on it either: when it is readable, it has ended.

QEMU 7.1 and 7.2 differ: they read nothing at all before both connections are there, and wait for an end of
RAM on the second before they take the end of the first.  Later ones must not get it: should the first break
then, nothing would read the second any more.
"""

import threading
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.channel.peer_timeout import AckedBytes
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.kernel import threads
from postcopy.memory.runs import Indices
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.wire_sink import PageRecords, send_records
from postcopy.stream import encoder


class PreemptChannel:
    """Sends requested pages at once: no batch, no window and no bandwidth limit delays them.

    :param on_break: called with the reason when the channel ends before :meth:`expect_end`.
    :param sends_end: whether the destination waits for an end of RAM.
    """

    def __init__(
        self,
        channel: Channel,
        counters: Counters,
        on_break: Callable[[PostcopyError], None],
        *,
        sends_end: bool = False,
    ) -> None:
        self._channel = channel
        self._acked = AckedBytes(channel)
        self._counters = counters
        self._on_break = on_break
        self.sends_end = sends_end
        self._records = PageRecords()
        self._sending = threading.Lock()  # the encoder knows one thread at a time
        self._ending = False
        self._watcher = threading.Thread(target=self._watch, name="preempt", daemon=True)

    def start(self) -> None:
        """Begin to watch for its end."""
        threads.start(self._watcher)

    def send(self, pages: BlockPages, wanted: Indices) -> None:
        """Send pages of a block, on the wire when it returns.

        :raises ChannelBroken: the destination does not take them, before :meth:`expect_end`.
        """
        try:
            with self._sending:
                for encoded in self._records.encode(pages, wanted):
                    self._counters.preempt_bytes += send_records(self._channel, encoded)
                    self._counters.add_pages(encoded.normal_pages, encoded.zero_pages)
        except ChannelBroken:
            if not self._ending:
                raise

    @property
    def taken_bytes(self) -> int:
        """What the peer has taken so far (its kernel, on TCP)."""
        return self._acked.of(self._channel.sent_bytes)

    def expect_end(self) -> None:
        """All pages have been sent: from now on an end of the channel is no error.

        :raises ChannelBroken: the destination does not take the end of RAM.
        """
        self._ending = True
        if self.sends_end:
            with self._sending:
                self._channel.send(encoder.end_of_ram())

    def shutdown(self) -> None:
        """Break it, from any thread."""
        self._ending = True
        self._channel.shutdown()

    def close(self) -> None:
        """Close it; what was sent still arrives."""
        self.shutdown()
        if self._watcher.is_alive() and self._watcher is not threading.current_thread():
            self._watcher.join()
        self._channel.close()

    def _watch(self) -> None:
        try:
            while self._channel.receive_into(memoryview(bytearray(1))):
                pass
            end: PostcopyError = ChannelBroken(
                f"{self._channel.description}: the destination closed the second connection; "
                "is postcopy-preempt switched on there? its own error says why"
            )
        except PostcopyError as error:
            end = error
        if not self._ending:
            self._on_break(end)
