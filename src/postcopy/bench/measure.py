"""The end of a measurement that measures: round trips, and what the link carries.

Pages go out as a migration sends them: records gathered from memory on the main channel, packets on
those of multifd.  The peer's clock tells how fast they came, so that what buffers hold at the beginning
and end does not count.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.bench import wire
from postcopy.bench.wire import Greeting, Kind, Wire
from postcopy.channel.address import Address, TcpAddress, UnixAddress
from postcopy.channel.channel import Channel
from postcopy.channel.connect import connect
from postcopy.channel.peer_timeout import AckedBytes, PeerTimeout
from postcopy.channel.tls_channel import secure
from postcopy.errors import ChannelBroken, PostcopyError, Refused
from postcopy.kernel import threads
from postcopy.source.flow_control import PushPolicy
from postcopy.stream.multifd_encoder import gathered, page_headers
from postcopy.stream.multifd_header import PACKET_PAGES
from postcopy.stream.numbers import TARGET_PAGE_BYTES
from postcopy.stream.ram_encoder import Iovecs, IovecTable, PageEncoder, joined
from postcopy.tls_options import TlsOptions

_MEMORY_PAGES: Final = 16384  # 64 MiB: more than a cache of one CPU has
_BATCH_PAGES: Final = 256
_BLOCK: Final = "bench"
_PINGS: Final = 200
_PINGS_S: Final = 1.0
_FEW_PINGS: Final = 5
_PINGS_UNDER_LOAD: Final = 10_000
_PAUSE_S: Final = 0.002
_WARM_UP: Final = 0.25  # of the time of a load
_FIRST, _LAST = 1, 2  # marks
_CONNECT_S: Final = 4.0

Pages = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Times from a question to its answer, in microseconds."""

    p50_us: int
    p99_us: int
    mean_us: int

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "RoundTrip":
        """Of one sample or more."""
        p50, p99 = np.percentile(samples_us, (50, 99))
        return cls(round(p50), round(p99), round(float(np.mean(samples_us))))


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What a link can do, with both ends as they are.

    :ivar bandwidth: bytes of pages a second over one connection, through the code of a migration.
    :ivar channels, channels_bandwidth: and over so many connections of multifd; 0 and None: not measured.
    :ivar idle, loaded: round trips on a connection of its own, without other traffic and beside the push of
        a postcopy.
    """

    bandwidth: int
    channels: int
    channels_bandwidth: int | None
    idle: RoundTrip
    loaded: RoundTrip
    encrypted: bool


class Measurement:
    """One measurement of a link.

    :param channels: of multifd; 0: none is measured.
    :param seconds: how long each of the loads is.
    :param tls: None: in clear text. :param silent_ms: how long the peer may do nothing.
    :raises Refused: it is no address at which something can listen.
    """

    def __init__(
        self,
        address: Address,
        *,
        channels: int = 0,
        seconds: float = 1.0,
        tls: TlsOptions | None = None,
        silent_ms: int = wire.SILENT_MS,
    ) -> None:
        if not isinstance(address, TcpAddress | UnixAddress):
            raise Refused(f"{address}: a link is measured to tcp:HOST:PORT or unix:PATH")
        self._address = address
        self._channels = channels
        self._seconds = seconds
        self._tls = tls
        self._silent_ms = silent_ms
        self._session = os.urandom(wire.SESSION_BYTES)
        self._lock = threading.Lock()
        # Under `_lock`: the connections that are open, how many there have been, and why all were broken.
        self._open: list[tuple[Channel, AckedBytes]] = []
        self._numbers = 0
        self._why: str | None = None

    def run(self) -> LinkFigures:
        """Measure; a few seconds.

        :raises PostcopyError: the peer cannot be reached, is something else, or does nothing for 4 s.
        """
        silence = PeerTimeout(
            lambda: self._silent_ms,
            self._signs,
            lambda: bool(self._open),
            lambda s: self._break(f"{self._address}: the peer has done nothing for {s:g} s"),
        )
        silence.start()
        try:
            return self._measure()
        except ChannelBroken as error:
            if self._why is None:
                raise
            raise ChannelBroken(self._why) from error
        finally:
            silence.stop()

    def cancel(self) -> None:
        """Make :meth:`run` raise; from any thread."""
        self._break(f"{self._address}: the measurement was given up")

    def _measure(self) -> LinkFigures:
        memory = np.random.default_rng().integers(
            0, 256, (_MEMORY_PAGES, TARGET_PAGE_BYTES), np.uint8
        )
        with self._connection() as pinged:
            idle = RoundTrip.of([*_pings(pinged, _PINGS, lambda: False)])
            bandwidth = self._load(memory, 1, in_place=False)
            loaded = self._pings_beside_a_push(pinged, memory)
            several = None
            if self._channels:
                several = self._load(memory, self._channels, in_place=True)
            encrypted = pinged.channel.encrypted
        return LinkFigures(bandwidth, self._channels, several, idle, loaded, encrypted)

    def _load(self, memory: Pages, count: int, *, in_place: bool) -> int:
        """Return how many bytes a second come over so many connections at once."""
        with contextlib.ExitStack() as connections:
            opened = [connections.enter_context(self._connection()) for _ in range(count)]
            tasks = [
                _Task(
                    partial(_rate, each, memory, self._seconds, in_place=in_place), self._broken_by
                )
                for each in opened
            ]
            return round(sum(task.result() for task in tasks))

    def _pings_beside_a_push(self, pinged: Wire, memory: Pages) -> RoundTrip:
        with self._connection() as loaded:
            loaded.channel.bound_buffers(PushPolicy().send_buffer_bytes)
            load = _Task(partial(_rate, loaded, memory, self._seconds), self._broken_by)
            samples = [*_pings(pinged, _PINGS_UNDER_LOAD, load.done)]
            load.result()
        return RoundTrip.of(samples)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Wire]:
        """Open one more connection of the session, and end it in the way of the protocol."""
        channel = connect(self._address, timeout_s=_CONNECT_S)
        if self._tls is not None:
            host = self._address.host if isinstance(self._address, TcpAddress) else ""
            channel = secure(channel, self._tls, host)
        entry = channel, AckedBytes(channel)
        with channel:
            with self._lock:
                number, self._numbers = self._numbers, self._numbers + 1
                self._open.append(entry)
                if self._why is not None:
                    raise ChannelBroken(self._why)
            try:
                found = Wire(channel, wire.FROM_LISTENER)
                greeting = Greeting(number, self._session)
                channel.send(greeting.encode())
                found.welcome(greeting)
                yield found
                channel.send(wire.encode(Kind.END))
            finally:
                with self._lock:
                    self._open.remove(entry)

    def _signs(self) -> object:
        with self._lock:
            return [(c.received_bytes, acked.of(c.sent_bytes)) for c, acked in self._open]

    def _broken_by(self, error: PostcopyError) -> None:
        self._break(str(error))

    def _break(self, why: str) -> None:
        with self._lock:
            self._why = self._why or why
            for channel, _ in self._open:
                channel.shutdown()


class _Task:
    """Work in a thread of its own.

    :param on_failure: called when it has failed, to end what others wait for.
    """

    def __init__(
        self, work: Callable[[], float], on_failure: Callable[[PostcopyError], None]
    ) -> None:
        self._work = work
        self._on_failure = on_failure
        self._ended = threading.Event()
        self._result = 0.0
        self._error: PostcopyError | None = None
        self._thread = threads.start(threading.Thread(target=self._run, name="load", daemon=True))

    def done(self) -> bool:
        """Wait a moment for its end; return whether it has ended."""
        return self._ended.wait(_PAUSE_S)

    def result(self) -> float:
        """Wait for its end, and return its result.

        :raises PostcopyError: it has failed.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._work()
        except PostcopyError as error:
            self._error = error
            self._on_failure(error)
        finally:
            self._ended.set()


def _pings(connection: Wire, most: int, is_over: Callable[[], bool]) -> Iterator[float]:
    """Ask until it is over, or often enough; the microseconds of each answer."""
    began = time.monotonic()
    for number in range(most):
        asked_ns = time.perf_counter_ns()
        connection.channel.send(wire.encode(Kind.PING, number))
        answer = connection.message()
        if answer.kind is not Kind.PONG or answer.value != number:
            connection.refuse(f"{answer.kind.name} {answer.value} in place of PONG {number}")
        yield (time.perf_counter_ns() - asked_ns) / 1000
        is_late = most == _PINGS and number >= _FEW_PINGS and time.monotonic() - began > _PINGS_S
        if is_over() or is_late:
            return


def _rate(connection: Wire, memory: Pages, seconds: float, *, in_place: bool = False) -> float:
    """Send pages for so long; return how many bytes a second have come in its later part."""
    channel = connection.channel
    began = time.monotonic()
    batches = _packets(memory) if in_place else _records(memory)
    for mark, until in ((_FIRST, began + seconds * _WARM_UP), (_LAST, began + seconds)):
        while time.monotonic() < until:
            channel.send_gathered(next(batches))
        channel.send_gathered(next(batches))  # one at least
        channel.send(wire.encode(Kind.MARK, mark))
    first_bytes, first_ns = _marked(connection, _FIRST)
    last_bytes, last_ns = _marked(connection, _LAST)
    if last_bytes <= first_bytes or last_ns <= first_ns:
        connection.refuse("MARKED goes back")
    return (last_bytes - first_bytes) * 1e9 / (last_ns - first_ns)


def _marked(connection: Wire, mark: int) -> tuple[int, int]:
    answer = connection.message()
    if answer.kind is not Kind.MARKED or answer.value != mark:
        connection.refuse(f"{answer.kind.name} {answer.value} in place of MARKED {mark}")
    return connection.marked(answer)


def _records(memory: Pages) -> Iterator[IovecTable]:
    """Messages of records as the main channel has them, for ever."""
    encoder = PageEncoder(_BATCH_PAGES)
    offsets = np.arange(len(memory), dtype=np.uint64) * np.uint64(TARGET_PAGE_BYTES)
    for at in cycle(range(0, len(memory), _BATCH_PAGES)):
        records, _ = encoder.nonzero_pages(_BLOCK, offsets[at : at + _BATCH_PAGES], memory)
        head = wire.encode(Kind.PAGES, wire.COPIED, len(records))
        yield joined((head, records))


def _packets(memory: Pages) -> Iterator[IovecTable]:
    """Messages of packets as a channel of multifd has them, for ever."""
    offsets = np.arange(len(memory), dtype=np.uint64) * np.uint64(TARGET_PAGE_BYTES)
    step = 2 * PACKET_PAGES
    for at in cycle(range(0, len(memory), step)):
        headers = page_headers(_BLOCK, offsets[at : at + step], "none")
        table = gathered(headers, memory, np.arange(at, at + step))
        packets = Iovecs(table, int(table[:, 1].sum()), (headers, memory))
        head = wire.encode(Kind.PAGES, wire.IN_PLACE, len(packets))
        yield joined((head, packets))
