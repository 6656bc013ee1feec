"""The connections of one source: a main channel, and those of multifd, told apart by their first bytes.

They may come in any order.  All of them are there when the main channel has told of the RAM blocks: before,
a source does not go on without them.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

from postcopy.channel.channel import Channel
from postcopy.channel.listen import Listener
from postcopy.errors import ChannelBroken, PostcopyError, StreamError
from postcopy.kernel import threads
from postcopy.multifd.group import IDENTIFY_S, MAGIC_BYTES, MOST_CHANNELS, MultifdGroup, first_bytes
from postcopy.stream import multifd_header, numbers

_LOOK_S: Final = 0.02
"""While a source connects: how often it is looked whether no connection waits any more."""


class SourceChannels:
    """Accepts the connections of one source.

    :param group: gets the channels of multifd.
    :param on_failure: called when no connection can be accepted; from another thread.
    :param note: takes a line for the user, about a connection that was closed.
    """

    def __init__(
        self,
        listener: Listener,
        group: MultifdGroup,
        on_failure: Callable[[Exception], None],
        note: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._group = group
        self._on_failure = on_failure
        self._note = note
        self._changed = threading.Condition()
        # Under `_changed`:
        self._main: tuple[Channel, bytes] | None = None
        self._channels: list[Channel] = []
        self._unknown = 0  # connections that have not said what they are
        self._idle = 0  # how often no connection has been waiting
        self._closed = False
        self._threads: list[threading.Thread] = []

    def main(self) -> tuple[Channel, bytes]:
        """Wait for the main channel, as long as it takes.

        :return: it, and what has been received of it.
        :raises ChannelBroken: :meth:`close` has been called.
        :raises HostCannot: there can be no more threads.
        """
        self._start("accept", self._accept)
        with self._changed:
            self._changed.wait_for(lambda: self._main is not None or self._closed)
            if self._main is None:
                raise ChannelBroken("no longer waiting for a source")
            return self._main

    def settle(self, *, multifd_is_on: bool) -> None:
        """Take all channels that the source has opened before now, and no others.

        :param multifd_is_on: the source has said so.
        :raises StreamError: one is missing.
        :raises ChannelBroken: :meth:`close` has been called.
        """
        # A connection that never says what it is is given up before.
        until = time.monotonic() + 2 * IDENTIFY_S
        with self._changed:
            idle = self._idle + 2  # the next look may have been taken before now
            while not self._is_settled(idle, multifd_is_on=multifd_is_on):
                if self._closed:
                    raise ChannelBroken("no longer waiting for channels")
                if time.monotonic() > until:
                    raise StreamError("multifd: the source has not opened all of its channels")
                self._changed.wait(_LOOK_S)
        self._listener.close()

    def _is_settled(self, idle: int, *, multifd_is_on: bool) -> bool:
        group = self._group
        there = group.complete and (group.count > 0 or not multifd_is_on)
        return there and not self._unknown and self._idle >= idle

    def close(self) -> None:
        """Break and close all connections, and end all threads.  Any number of times."""
        self.shutdown()
        for thread in self._threads:
            thread.join()
        for channel in self._channels:
            channel.close()

    def shutdown(self) -> None:
        """Break all connections but the main one.  Any number of times, from any thread."""
        with self._changed:
            self._closed = True
            main = None if self._main is None else self._main[0]
            others = [channel for channel in self._channels if channel is not main]
            self._changed.notify_all()
        self._listener.close()
        self._group.close()
        for channel in others:
            channel.shutdown()

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(threads.start(thread))

    def _accept(self) -> None:
        try:
            while True:
                try:
                    channel = self._listener.accept(_LOOK_S if self._channels else None)
                except TimeoutError:
                    with self._changed:
                        self._idle += 1
                        self._changed.notify_all()
                else:
                    self._take(channel)
        except ChannelBroken:
            pass  # closed
        except PostcopyError as error:
            self._on_failure(error)

    def _take(self, channel: Channel) -> None:
        with self._changed:
            full = self._closed or len(self._threads) > MOST_CHANNELS + 2
            if not full:
                self._channels.append(channel)
                self._unknown += 1
        if full:
            self._drop(channel, "there are too many connections")
            return
        self._start("channel", lambda: self._identify(channel))

    def _drop(self, channel: Channel, why: str) -> None:
        self._note(f"{channel.description}: {why}; ignored")
        channel.close()

    def _identify(self, channel: Channel) -> None:
        first = b""
        try:
            first = first_bytes(channel)
        except ChannelBroken:
            pass
        magic = int.from_bytes(first, "big") if len(first) == MAGIC_BYTES else None
        with self._changed:
            is_main = magic == numbers.MAGIC and self._main is None
            if is_main:
                self._main = channel, first
            if magic != multifd_header.MAGIC:
                self._unknown -= 1
            self._changed.notify_all()
        if magic == multifd_header.MAGIC:
            self._group.run(channel, first, self._known)
        elif not is_main:
            self._forget(
                channel, "Not a migration stream" if magic != numbers.MAGIC else "a second one"
            )

    def _known(self) -> None:
        with self._changed:
            self._unknown -= 1
            self._changed.notify_all()

    def _forget(self, channel: Channel, why: str) -> None:
        with self._changed:
            self._channels.remove(channel)
            closed = self._closed
        if not closed:
            self._note(f"{channel.description}: {why}; ignored")
        channel.close()
