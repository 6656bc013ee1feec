"""The end of a measurement that listens: answers, takes pages, and says how many have come by when.

Pages are put where a destination puts them before its guest runs: those of the main channel are copied out
of a buffer into memory that is there already, those of multifd are received in it.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from postcopy.bench import wire
from postcopy.bench.wire import Greeting, Kind, Message, Wire
from postcopy.channel.channel import Channel
from postcopy.channel.listen import Listener
from postcopy.channel.peer_timeout import PeerTimeout
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.kernel import threads

_MEMORY_BYTES: Final = 64 << 20
_MOST_CONNECTIONS: Final = wire.MOST_CHANNELS + 8
"""At once, with those that have not greeted yet; a further one is closed."""
_LONGEST_S: Final = 120.0
"""A measurement takes a few seconds; on the slowest links less than this."""
_MIB: Final = 1 << 20


class _Session:
    """One measurement; all of it is used under the server's lock."""

    def __init__(self, session: bytes) -> None:
        self.session = session
        self.members: dict[int, Channel] = {}
        self.connections = 0
        self.received_bytes = 0
        self.began = time.monotonic()
        self.failure: PostcopyError | None = None


class Server:
    """Serves one measurement after the other; the connections of another one meanwhile are refused.

    :param listener: is the caller's.
    :param note: takes a line for the user; from any thread.
    :param longest_s: how long a measurement may take. :param silent_ms: how long its peer may do nothing.
    """

    def __init__(
        self,
        listener: Listener,
        note: Callable[[str], None],
        *,
        longest_s: float = _LONGEST_S,
        silent_ms: int = wire.SILENT_MS,
    ) -> None:
        self._listener = listener
        self._note = note
        self._longest_s = longest_s
        self._silent_ms = silent_ms
        self._memory = np.ones(_MEMORY_BYTES, np.uint8)  # written to: the pages are there
        self._changed = threading.Condition()
        # Under `_changed`:
        self._session: _Session | None = None
        self._connections: dict[Channel, threading.Thread] = {}
        self._failures: set[Channel] = set()  # that have been noted
        self._once = False
        self._stopped = False
        self._ended: _Session | None = None

    def run(self, *, once: bool) -> None:
        """Serve until :meth:`stop`; or until one measurement has ended.

        :raises PostcopyError: that measurement has failed, or no connection can be taken.
        """
        self._once = once
        try:
            while True:
                self._begin(self._listener.accept())
        except ChannelBroken:
            pass  # closed, by `stop` or at the end of the measurement
        finally:
            self._end_all()
        if self._ended is not None and self._ended.failure is not None:
            raise self._ended.failure

    def stop(self) -> None:
        """End, with what is under way; from any thread, any number of times."""
        self._listener.close()

    def _end_all(self) -> None:
        with self._changed:
            self._stopped = True
            running = [*self._connections.items()]
        for channel, _ in running:
            channel.shutdown()
        for _, thread in running:
            thread.join()

    def _begin(self, channel: Channel) -> None:
        work = partial(self._serve, channel)
        thread = threading.Thread(target=work, name="bench-connection", daemon=True)
        with self._changed:
            if len(self._connections) < _MOST_CONNECTIONS:
                self._connections[channel] = thread
                try:
                    threads.start(thread)
                except PostcopyError as error:
                    del self._connections[channel]
                    self._note(f"{channel.description}: {error}; ignored")
                else:
                    return
            else:
                self._note(f"{channel.description}: too many connections at once; ignored")
        channel.close()

    # --- the threads of connections

    def _serve(self, channel: Channel) -> None:
        silence = PeerTimeout(
            lambda: self._silent_ms,
            lambda: self._signs(channel),
            lambda: True,
            lambda s: self._give_up(channel, f"the peer has done nothing for {s:g} s"),
        )
        why = f"the measurement has taken {self._longest_s:g} s"
        overdue = threading.Timer(self._longest_s, self._give_up, (channel, why))
        overdue.daemon = True
        try:
            silence.start()
            threads.start(overdue)
            self._greet_and_answer(channel)
        except PostcopyError as error:
            if not self._stopped:
                self._failed(channel, error)
        finally:
            overdue.cancel()
            silence.stop()
            self._leave(channel)

    def _greet_and_answer(self, channel: Channel) -> None:
        threads.run_soon()
        incoming = Wire(channel, wire.FROM_MEASURER)
        greeting = incoming.greeting()
        refusal = self._join(greeting, channel)
        channel.send(greeting.encode())
        if refusal is not None:
            channel.send(wire.encode_refusal(refusal))
            self._note(f"{channel.description}: {refusal}")
            return
        channel.send(wire.encode(Kind.WELCOME))
        at = greeting.channel * (_MEMORY_BYTES // wire.MOST_CHANNELS)
        _Answering(incoming, self._memory, at).run()

    def _join(self, greeting: Greeting, channel: Channel) -> str | None:
        """Make a connection one of the measurement; return why it cannot be."""
        with self._changed:
            running = self._session
            if running is None and not greeting.channel and self._ended is None:
                running = self._session = _Session(greeting.session)
                self._note(f"{channel.description}: measures")
            if running is None or running.session != greeting.session:
                return "another measurement is under way, or this one has ended; try again"
            if greeting.channel in running.members:
                return f"channel {greeting.channel} of this measurement is there already"
            running.members[greeting.channel] = channel
            running.connections += 1
            return None

    def _signs(self, channel: Channel) -> int:
        """What changes when the peer does something, on any connection of its measurement."""
        with self._changed:
            members = () if self._session is None else tuple(self._session.members.values())
        return sum(each.received_bytes for each in (members if channel in members else (channel,)))

    def _give_up(self, channel: Channel, why: str) -> None:
        """Break a connection that takes too long."""
        self._failed(channel, ChannelBroken(f"{channel.description}: {why}; given up"))
        channel.shutdown()

    def _failed(self, channel: Channel, error: PostcopyError) -> None:
        """Note why a connection ends, once; the first failure is that of its measurement."""
        with self._changed:
            if channel in self._failures:
                return
            self._failures.add(channel)
            running = self._session
            if running is not None and channel in running.members.values():
                first = running.failure is None
                running.failure = running.failure or error
                if not first:
                    return
        self._note(str(error))

    def _leave(self, channel: Channel) -> None:
        ended = None
        with self._changed:
            running = self._session
            if running is not None and channel in running.members.values():
                running.received_bytes += channel.received_bytes
                running.members = {n: c for n, c in running.members.items() if c is not channel}
                if not running.members:
                    ended, self._session = running, None
                    self._ended = ended if self._once else None
            self._failures.discard(channel)
        channel.close()
        if ended is not None:
            self._say_ended(ended)
            if self._once:
                self._listener.close()
        with self._changed:
            del self._connections[channel]  # from here nobody waits for this thread

    def _say_ended(self, session: _Session) -> None:
        took_s = time.monotonic() - session.began
        if session.failure is None:
            self._note(
                f"measured over {session.connections} connections: {session.received_bytes / _MIB:.0f} MiB "
                f"came in {took_s:.1f} s"
            )


class _Answering:
    """The answers on one connection.

    :param at: where its pages are put.
    """

    def __init__(self, incoming: Wire, memory: "np.typing.NDArray[np.uint8]", at: int) -> None:
        self._wire = incoming
        self._memory = memory
        self._at = at
        self._buffer = np.empty(wire.MOST_PAGES_BYTES, np.uint8)
        self._page_bytes = 0

    def run(self) -> None:
        """Answer until the peer says that it is done."""
        while (message := self._wire.message()).kind is not Kind.END:
            if message.kind is Kind.PAGES:
                self._take(message)
            elif message.kind is Kind.PING:
                self._wire.channel.send(wire.encode(Kind.PONG, message.value))
            else:
                now = time.monotonic_ns()
                self._wire.channel.send(wire.encode_marked(message.value, self._page_bytes, now))

    def _take(self, message: Message) -> None:
        length = message.length
        place = self._memory[self._at : self._at + length]
        if message.value not in (wire.COPIED, wire.IN_PLACE):
            self._wire.refuse(f"PAGES with the value {message.value:#x}; 0 or 1 is taken")
        if message.value == wire.IN_PLACE:
            self._wire.body_into(place.data)
        else:
            self._wire.body_into(self._buffer[:length].data)
            place[:] = self._buffer[:length]
        self._page_bytes += length
