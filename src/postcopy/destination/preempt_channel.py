"""Requested pages on a channel of their own (``postcopy-preempt``), read by the thread ``preempt``.

Source: QEMU's ``docs/devel/migration/postcopy.rst``, "Postcopy preempt mode".  Each connection has a
decoder and a placement of its own: block names and halves of huge pages are a channel's own affair.
"""

import threading
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.destination.incoming_channels import IncomingChannels, Surroundings
from postcopy.destination.whole_pages import PageReceiver
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.kernel import threads
from postcopy.kernel.threads import run_soon
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.paging.placement import Placement
from postcopy.stream.decoder import PreemptDecoder
from postcopy.stream.records import Pages


class PreemptChannel:
    """The preempt channel, one for each connection of the source; does nothing while it is switched off.

    :param wanted: whether it is switched on.
    """

    def __init__(self, surroundings: Surroundings, wanted: Callable[[], bool]) -> None:
        self._surroundings = surroundings
        self._ram = surroundings.ram
        self._wanted = wanted
        self._incoming: IncomingChannels | None = None
        self._channel: Channel | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Under `_changed`: how the channel has ended.
        self._ended = False
        self._closing = False
        self.failure: PostcopyError | None = None

    def expect(self, incoming: IncomingChannels) -> None:
        """Begin anew: the main channel of a connection has been accepted here."""
        self._incoming = incoming
        self._ended = self._closing = False
        self.failure = None

    def accept(self) -> None:
        """Wait until the source has connected; it does so before it stops its guest.

        :raises StreamError: it has not.
        """
        if not self._wanted():
            return
        assert self._incoming is not None
        self._channel = channel = self._incoming.preempt(self._surroundings.patience_s)
        channel.watch(self._surroundings.timeout_s)

    def start(self, userfaultfd: Userfaultfd) -> None:
        """Place what comes from now on."""
        if self._channel is None:
            return
        placement = self._surroundings.placement()
        placement.listen(userfaultfd)
        arguments = (self._channel, PreemptDecoder(self._surroundings.layout), placement)
        thread = threading.Thread(target=self._run, args=arguments, name="preempt", daemon=True)
        self._thread = threads.start(thread)

    @property
    def received_bytes(self) -> int:
        """Bytes received on the present channel."""
        channel = self._channel
        return channel.received_bytes if channel is not None else 0

    def finish(self) -> None:
        """The main channel has ended: wait for the pages that were requested, and close the channel.

        Only requested pages can still come.  A real QEMU closes its end after the destination has reported
        success, so this must not wait for the end of the channel.

        :raises PostcopyError: the channel broke before all had come.
        """
        if self._channel is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._ram.any_expected())
            if self.failure is not None:
                raise self.failure
            if self._ram.any_expected():
                raise ChannelBroken("the preempt channel ended before all requested pages had come")
        self.close()

    def shutdown(self) -> None:
        """Break it, from any thread."""
        channel, incoming = self._channel, self._incoming
        if incoming is not None:
            incoming.give_up()
        if channel is not None:
            channel.shutdown()

    def close(self) -> None:
        """Close it; on return nothing more is placed."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.shutdown()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # --- the thread "preempt"

    def _run(self, channel: Channel, decoder: PreemptDecoder, placement: Placement) -> None:
        run_soon()
        failure: PostcopyError | None = None
        try:
            receiver = PageReceiver(self._ram, self._surroundings.layout, placement)
            while receiver.receive(channel, decoder):
                self._place(decoder, placement)
            decoder.finish()
        except PostcopyError as error:
            failure = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            failure = failure or self._early_end(channel)
            if not self._closing:
                self.failure = failure
            self._changed.notify_all()
        if self.failure is not None:
            self._surroundings.on_failure()

    def _early_end(self, channel: Channel) -> PostcopyError | None:
        """Why the end of the channel is an error, unless the main channel ends soon as well."""
        timeout_s = self._surroundings.timeout_s
        if not timeout_s or self._changed.wait_for(lambda: self._closing, timeout_s):
            return None
        return ChannelBroken(f"{channel.description}: the source closed the second connection")

    def _place(self, decoder: PreemptDecoder, placement: Placement) -> None:
        while (record := decoder.next_record()) is not None:
            if isinstance(record, Pages):
                placement.pages(
                    record.block, record.offsets, record.data, neighbours=record.neighbours
                )
            else:
                placement.zeros(record.block, record.offsets)
        with self._changed:
            self._changed.notify_all()
