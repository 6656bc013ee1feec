"""Measure a link, and forecast migrations over it: what :func:`postcopy.measure_link` gives.

::

    link = await measure_link("tcp:there:4444", multifd=4, compress="zstd")
    for way in link.forecast(4 << 30, dirty_rate=200 << 20):
        print(way.name, way.total_s, way.reason)
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack

from postcopy.bench.compression import Compression, measure_compression
from postcopy.bench.forecast import Forecast, Guest, Way
from postcopy.bench.measure import LinkFigures, Measurement, RoundTrip
from postcopy.bench.wire import MOST_MULTIFD
from postcopy.channel.address import parse
from postcopy.channel.tls_session import context_for
from postcopy.client.migration_model import Writes
from postcopy.errors import Refused
from postcopy.tls_options import TlsOptions

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class LinkBench:
    """What was measured.

    :ivar uri: of the other end.
    :ivar compression: None: it was not asked for.
    """

    uri: str
    link: LinkFigures
    compression: Compression | None

    def forecast(
        self,
        memory_bytes: int,
        dirty_rate: int | Writes,
        *,
        working_set: int | None = None,
        max_downtime_ms: int = 300,
        bandwidth: int = 0,
    ) -> Sequence[Way]:
        """What a migration of a guest takes and costs, by each way.

        :param memory_bytes: that are not zero.
        :param dirty_rate: bytes of different pages that it writes in a second; or what
            :meth:`postcopy.Machine.estimate` has measured.
        :param working_set: it writes to so many bytes; None: to all its memory.
        :param bandwidth: ``max-bandwidth``, bytes a second; 0: none.
        """
        guest = guest_of(memory_bytes, dirty_rate, working_set, max_downtime_ms, bandwidth)
        return Forecast(self.link, self.compression, guest).ways()

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)

    def lines(self) -> Iterator[tuple[str, str]]:
        """The figures for a user."""
        link = self.link
        yield "link", f"{self.uri}, {'encrypted' if link.encrypted else 'in clear text'}"
        more = ""
        if link.channels_bandwidth is not None:
            more = f", {link.channels_bandwidth / _MIB:.0f} over {link.channels} of multifd"
        yield "bandwidth", f"{link.bandwidth / _MIB:.0f} MiB/s over one connection{more}"
        yield "round trip", f"{_times(link.idle)}; beside a full link {_times(link.loaded)}"
        if (found := self.compression) is not None:
            yield (
                found.name,
                f"{found.bandwidth / _MIB:.0f} MiB/s of pages a CPU ({found.cpus} CPUs), "
                f"{found.ratio:.1f} times smaller",
            )


def _times(trip: RoundTrip) -> str:
    return f"p50 {trip.p50_us / 1000:.2f} ms, p99 {trip.p99_us / 1000:.2f} ms"


def guest_of(
    memory_bytes: int,
    dirty_rate: int | Writes,
    working_set: int | None,
    max_downtime_ms: int,
    bandwidth: int,
) -> Guest:
    """A guest as :meth:`LinkBench.forecast` is told of it."""
    writes = dirty_rate
    if not isinstance(writes, Writes):
        writes = Writes.at_rate(writes, working_set)
    return Guest(memory_bytes, writes, max_downtime_ms, bandwidth)


class LinkOptions(TypedDict, total=False):
    """The options of :func:`measure_link`.

    :ivar multifd: measure so many connections at once, too.
    :ivar compress: with ``multifd``: measure how fast this host compresses pages.
    :ivar tls: folder with the certificates of this host; ``tls_hostname``: as for ``migrate``.
    :ivar seconds: how long each of the two or three loads is; 1 unless given.
    """

    multifd: int | None
    compress: Literal["zlib", "zstd"] | None
    tls: str | Path | None
    tls_hostname: str | None
    seconds: float


async def measure_link(uri: str, **options: Unpack[LinkOptions]) -> LinkBench:
    """Measure the link to ``postcopy bench --listen`` of another host; a few seconds.

    :param uri: where that listens, ``tcp:HOST:PORT`` or ``unix:PATH``.
    :raises Refused: not with these options.
    :raises PostcopyError: the other end cannot be reached, is something else, or does nothing.
    """
    multifd, compress = options.get("multifd"), options.get("compress")
    if multifd is not None and not 1 <= multifd <= MOST_MULTIFD:
        raise Refused(f"multifd={multifd}; 1 to {MOST_MULTIFD} connections are measured")
    if compress is not None and multifd is None:
        raise Refused("only channels of multifd are compressed; give their number, too")
    credentials = None
    if (folder := options.get("tls")) is not None:
        hostname = options.get("tls_hostname") or ""
        credentials = TlsOptions(str(Path(folder).absolute()), is_server=False, hostname=hostname)
        context_for(credentials)
    seconds = options.get("seconds", 1.0)
    work = Measurement(parse(uri), channels=multifd or 0, seconds=seconds, tls=credentials)
    running = asyncio.create_task(asyncio.to_thread(work.run))
    try:
        link = await asyncio.shield(running)
    except asyncio.CancelledError:
        work.cancel()
        await asyncio.wait({running})
        running.exception()  # asyncio logs one that no caller has retrieved
        raise
    # Not before: this side would seem to do nothing meanwhile.
    found = None if compress is None else await asyncio.to_thread(measure_compression, compress)
    return LinkBench(uri, link, found)
