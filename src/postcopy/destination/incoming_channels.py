"""Accepts the connections of one source: the main channel, those of multifd, and the preempt channel.

Without multifd a source sends no header on its second connection, the preempt channel: only the order tells
the two apart, as in QEMU.  With multifd the first bytes of a connection say what it is, in any order, until
all of these are there; the next one is the preempt channel.  Every other connection is closed.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from postcopy.channel.channel import Channel
from postcopy.channel.listen import Listener
from postcopy.errors import ChannelBroken, HostCannot, PostcopyError, StreamError
from postcopy.kernel import threads
from postcopy.multifd.group import MAGIC_BYTES, MOST_CHANNELS, MultifdGroup, first_bytes
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.placement import Placement
from postcopy.paging.ram import IncomingRam
from postcopy.stream import multifd_header, numbers
from postcopy.stream.layout import Layout

_PATIENCE_S: Final = 30.0
"""How long to wait for a channel without ``x-link-timeout``: a stopped guest waits meanwhile."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the channels beside the main one have to do with.

    :ivar layout: the blocks of this side.
    :ivar timeout_ms: returns how long the source may take to open them; 0: half a minute.
    :ivar on_failure: called when one has failed, to wake the main channel's reader.
    """

    ram: IncomingRam
    faults: FaultTable
    layout: Layout
    timeout_ms: Callable[[], int]
    on_failure: Callable[[], None]

    @property
    def timeout_s(self) -> float:
        """Of a silent source; 0: none."""
        return self.timeout_ms() / 1000

    @property
    def patience_s(self) -> float:
        """How long the source may take to open a channel."""
        return self.timeout_s or _PATIENCE_S

    def placement(self) -> Placement:
        """What places the pages of one channel."""
        return Placement(self.ram, self.faults)


class IncomingChannels:
    """Takes over a listener.

    :param preempt_wanted: whether a preempt channel is expected; asked at each further connection.
    """

    def __init__(self, listener: Listener, preempt_wanted: Callable[[], bool]) -> None:
        self._listener = listener
        self._preempt_wanted = preempt_wanted
        self._group: MultifdGroup | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Under `_changed`: the main channel, and what has been received of it.
        self._main: tuple[Channel, bytes] | None = None
        # The preempt channel, until :meth:`preempt` returns it.
        self._preempt: Channel | None = None
        self._had_preempt = False
        self._closed = False
        self._failure: PostcopyError | None = None
        # With multifd: the other connections, and their threads.
        self._others: list[tuple[Channel, threading.Thread]] = []

    def main(self) -> Channel:
        """Wait for the main channel of a source without multifd.

        :raises ChannelBroken: :meth:`close` has been called.
        :raises HostCannot: there can be no more threads.
        """
        channel = self._listener.accept()
        try:
            self._start()
        except HostCannot:
            channel.close()
            raise
        return channel

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="accept", daemon=True)
        self._thread = threads.start(thread)  # from here `close` may wait for its end

    def main_beside(self, group: MultifdGroup | None) -> tuple[Channel, bytes]:
        """As :meth:`main`, beside channels of multifd, which may come before it.

        :param group: runs these; None: multifd is off.
        :return: the main channel, and what has been received of it already.
        """
        if group is None:
            return self.main(), b""
        self._group = group
        self._start()
        with self._changed:
            self._changed.wait_for(
                lambda: self._main is not None or self._closed or self._failure is not None
            )
            if self._main is not None:
                return self._main
            raise self._failure or ChannelBroken("no longer waiting for a source")

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

    def close_others(self) -> None:
        """Break and close all connections but the main and the preempt channel; after :meth:`close`."""
        others, self._others = self._others, []
        for channel, _ in others:
            channel.shutdown()
        for channel, thread in others:
            thread.join()
            channel.close()

    def _run(self) -> None:
        try:
            while True:
                self._sort(self._listener.accept())
        except ChannelBroken:
            pass  # closed
        except PostcopyError as error:
            with self._changed:
                self._failure = error  # for a thread that waits for a channel
                self._changed.notify_all()

    def _sort(self, channel: Channel) -> None:
        with self._changed:
            if self._group is not None and not self._all_there(self._group):
                self._identify_later(channel, self._group)
                return
            if self._preempt_wanted() and not self._had_preempt and not self._closed:
                self._preempt = channel
                self._had_preempt = True
                self._changed.notify_all()
                return
        _ignore(channel, "Extra incoming migration connection")

    # --- with multifd

    def _all_there(self, group: MultifdGroup) -> bool:
        """Whether only the preempt channel can come; otherwise one channel too many has to be named."""
        return self._main is not None and group.all_there and self._preempt_wanted()

    def _identify_later(self, channel: Channel, group: MultifdGroup) -> None:
        if len(self._others) > MOST_CHANNELS + 1:
            _ignore(channel, "Extra incoming migration connection")
            return
        thread = threading.Thread(
            target=self._identify, args=(channel, group), name="multifd", daemon=True
        )
        self._others.append((channel, thread))
        threads.start(thread)

    def _identify(self, channel: Channel, group: MultifdGroup) -> None:
        try:
            first = first_bytes(channel)
        except ChannelBroken:
            return
        magic = int.from_bytes(first, "big") if len(first) == MAGIC_BYTES else None
        if magic == multifd_header.MAGIC:
            group.run(channel, first, lambda: None)
            return
        with self._changed:
            is_main = magic == numbers.MAGIC and self._main is None and not self._closed
            if is_main:
                self._main = channel, first
                self._others = [other for other in self._others if other[0] is not channel]
                self._changed.notify_all()
        if not is_main:
            _ignore(
                channel,
                "Not a migration stream" if magic != numbers.MAGIC else "Extra main channel",
            )


def _ignore(channel: Channel, why: str) -> None:
    sys.stderr.write(f"postcopy: {why}; ignoring\n")
    channel.close()
