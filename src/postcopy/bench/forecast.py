"""What a migration over a measured link would take and cost, by each way, with the reason in words.

The rounds and faults are those of :mod:`postcopy.client.migration_model`; what a way costs besides is here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from postcopy.bench.compression import Compression
from postcopy.bench.measure import LinkFigures
from postcopy.client.migration_model import Writes, faults_of, rounds_of

_MIB: Final = 1 << 20
_SETUP_S: Final = 0.015
_SETUP_ROUND_TRIPS: Final = 3
_SWITCHOVER_S: Final = 0.010
_SWITCHOVER_ROUND_TRIPS: Final = 2
"""Of our own machine: to connect and list the blocks; to stop the vCPUs, save them and start them there."""
_FAULT_S: Final = 0.0002
"""What a fault costs at the two ends, beside its round trip."""
_SAME_PAGES: Final = 1.05


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest that is to migrate.

    :ivar memory_bytes: that are not zero.
    :ivar max_downtime_ms: ``downtime-limit``.
    :ivar limit: ``max-bandwidth``, bytes a second; 0: none.  Postcopy has one of its own, and none here.
    """

    memory_bytes: int
    writes: Writes
    max_downtime_ms: int = 300
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """What a migration takes by one way.

    :ivar name: ``precopy``, ``postcopy`` or ``precopy, then postcopy``, and how many connections it has.
    :ivar bandwidth: bytes of pages a second before the switchover; of a postcopy at once: after it.
    :ivar converges: it ends, with a stop that is short enough.
    :ivar total_s, sent_bytes: until its end, and on the wire; None: it has no end.
    :ivar downtime_ms: how long the guest stands still, or would have to.
    :ivar rounds: of precopy.
    :ivar faults, wait_ms: pages that the guest would wait for, and how long, over all vCPUs: at most, and
        without those that it only reads.
    """

    name: str
    bandwidth: int
    converges: bool
    total_s: float | None
    downtime_ms: float
    sent_bytes: int | None
    rounds: int
    faults: int
    wait_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Lane:
    """How pages go in precopy."""

    name: str
    bandwidth: int  # of pages
    ratio: float  # bytes of pages for each on the wire
    carrier: str  # what decides the bandwidth


class Forecast:
    """All ways for one guest.

    :param compression: None: without.
    """

    def __init__(self, link: LinkFigures, compression: Compression | None, guest: Guest) -> None:
        self._link = link
        self._compression = compression
        self._guest = guest
        round_trip_s = link.idle.mean_us / 1e6
        self._setup_s = _SETUP_S + _SETUP_ROUND_TRIPS * round_trip_s
        self._switchover_s = _SWITCHOVER_S + _SWITCHOVER_ROUND_TRIPS * round_trip_s
        self._fault_s = _FAULT_S + link.loaded.mean_us / 1e6

    def ways(self) -> Sequence[Way]:
        """Reckon them."""
        lanes = [*self._lanes()]
        return (
            *(self._precopy(lane) for lane in lanes),
            self._postcopy(),
            *(self._both(lane) for lane in lanes),
        )

    def _lanes(self) -> Iterator[_Lane]:
        link, limit = self._link, self._guest.limit

        def limited(bandwidth: int) -> tuple[int, str]:
            if limit and limit < bandwidth:
                return limit, "max-bandwidth lets through"
            return bandwidth, "the link carries"

        yield _Lane("", *_with_ratio(*limited(link.bandwidth), 1.0))
        if link.channels_bandwidth is None:
            return
        name = f" over {link.channels} more connections"
        bandwidth, carrier = limited(link.channels_bandwidth)
        yield _Lane(name, *_with_ratio(bandwidth, carrier, 1.0))
        if (compression := self._compression) is not None:
            name = f"{name}, {compression.name}"
            cpus = min(link.channels, compression.cpus)
            if (most := compression.bandwidth * cpus) < bandwidth * compression.ratio:
                what = f"{compression.name} on {cpus} CPUs gets through"
                yield _Lane(name, most, compression.ratio, what)
            else:
                yield _Lane(name, *_with_ratio(bandwidth, carrier, compression.ratio))

    def _precopy(self, lane: _Lane) -> Way:
        guest = self._guest
        enough = lane.bandwidth * max(guest.max_downtime_ms, 1) / 1000
        found = rounds_of(guest.memory_bytes, guest.writes, lane.bandwidth, enough)
        stop_s = found.left_bytes / lane.bandwidth
        sent = round((sum(found.sent) + found.left_bytes) / lane.ratio)
        total_s = self._setup_s + found.seconds + stop_s + self._switchover_s
        return Way(
            name=f"precopy{lane.name}",
            bandwidth=lane.bandwidth,
            converges=found.converges,
            total_s=total_s if found.converges else None,
            downtime_ms=_ms(stop_s + self._switchover_s),
            sent_bytes=sent if found.converges else None,
            rounds=len(found.sent),
            faults=0,
            wait_ms=0,
            reason=(
                f"{len(found.sent)} rounds; {lane.carrier} {lane.bandwidth / _MIB:.0f} MiB/s"
                if found.converges
                else self._why_not(lane, found.left_bytes)
            ),
        )

    def _why_not(self, lane: _Lane, left_bytes: float) -> str:
        """Say why a precopy does not converge."""
        writes, left_s = self._guest.writes, left_bytes / lane.bandwidth
        carries = f"{lane.carrier} {lane.bandwidth / _MIB:.0f} MiB/s"
        if writes.in_time(2 * left_s) < writes.in_time(left_s) * _SAME_PAGES:
            return (
                f"does not converge: writes to the same {left_bytes / _MIB:.0f} MiB again and again, "
                f"{carries}, and the stop may last {self._guest.max_downtime_ms} ms"
            )
        rate = writes.in_time(1.0) / _MIB
        return f"does not converge: writes {rate:.0f} MiB/s, {carries}"

    def _postcopy(self) -> Way:
        guest, bandwidth = self._guest, self._link.bandwidth
        push_s = guest.memory_bytes / bandwidth
        faults = faults_of(guest.memory_bytes, guest.writes, push_s, self._fault_s)
        return Way(
            name="postcopy",
            bandwidth=bandwidth,
            converges=True,
            total_s=self._setup_s + self._switchover_s + push_s,
            downtime_ms=_ms(self._switchover_s),
            sent_bytes=guest.memory_bytes,
            rounds=0,
            faults=faults.count,
            wait_ms=round(1000 * faults.wait_s),
            reason=f"each page goes once; a fault takes {self._fault_s * 1e3:.1f} ms",
        )

    def _both(self, lane: _Lane) -> Way:
        guest, pushed = self._guest, self._link.bandwidth
        found = rounds_of(guest.memory_bytes, guest.writes, lane.bandwidth, 0.0)
        left = found.first_left_bytes
        faults = faults_of(left, guest.writes, left / pushed, self._fault_s)
        total_s = self._setup_s + found.sent[0] / lane.bandwidth + self._switchover_s
        return Way(
            name=f"precopy{lane.name}, then postcopy",
            bandwidth=lane.bandwidth,
            converges=True,
            total_s=total_s + left / pushed,
            downtime_ms=_ms(self._switchover_s),
            sent_bytes=round(found.sent[0] / lane.ratio + left),
            rounds=1,
            faults=faults.count,
            wait_ms=round(1000 * faults.wait_s),
            reason=f"after the first round {left / _MIB:.0f} MiB are left for postcopy",
        )


def _with_ratio(bandwidth: int, carrier: str, ratio: float) -> tuple[int, float, str]:
    return round(bandwidth * ratio), ratio, carrier


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


def lines_of_ways(guest: Guest, ways: Sequence[Way]) -> Iterator[str]:
    """For a person to read."""
    limit = f", max-bandwidth {guest.limit / _MIB:.0f} MiB/s" if guest.limit else ""
    yield (
        f"a guest of {guest.memory_bytes / _MIB:.0f} MiB that writes {guest.writes}, stopped for at most "
        f"{guest.max_downtime_ms} ms{limit}:"
    )
    yield ""
    rows = [("way", "time", "downtime", "sent", "faults", "waits", "because"), *map(_row, ways)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=True)]
        yield "  ".join((*cells, row[-1]))


def _row(way: Way) -> tuple[str, ...]:
    total = "no end" if way.total_s is None else f"{way.total_s:.1f} s"
    sent = "" if way.sent_bytes is None else f"{way.sent_bytes / _MIB:.0f} MiB"
    faults = f"<= {way.faults}" if way.faults else "0"
    waits = f"<= {way.wait_ms} ms" if way.faults else "0 ms"
    return (way.name, total, f"{way.downtime_ms:.0f} ms", sent, faults, waits, way.reason)


def way_to_json(way: Way) -> dict[str, Any]:
    """As JSON can carry it."""
    return asdict(way)
