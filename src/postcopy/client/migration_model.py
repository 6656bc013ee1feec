"""What a migration would take: one model for ``postcopy migrate --estimate`` and ``postcopy bench``.

A precopy is reckoned as :mod:`postcopy.source.precopy` does it.  A round goes through the memory in
chunks, each protected while the one before it is sent.  A chunk is written to from then until it is
protected again, in the next round: a round has what is written in a part of the round before and of its
own.  Pages of the first round that are written again between their protection and their turn are left
out of it.

How much is written in a time comes from two measurements.  A guest that writes the same pages again and
again writes less in the second than its rate times the time: of both follows a curve that bends towards the
size of what is written again and again.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

_MIB: Final = 1 << 20
_PAGE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 64 << 20
"""What :mod:`postcopy.source.dirty_pages` protects at a time."""
_MOST_ROUNDS: Final = 1000
_SHRINKS: Final = 0.99
_FIXED_POINT_STEPS: Final = 12
_ONE_SECOND: Final = 1.0


@dataclass(frozen=True, slots=True)
class Writes:
    """How much a guest writes: two measurements.

    :ivar short_s, long_s: how long was measured.
    :ivar short_bytes, long_bytes: the different pages that were written in that time.
    :ivar mode: of ``calc-dirty-rate``; ``told``: nothing was measured.
    :ivar most_bytes: it writes to no more than that; None: to all its memory.
    """

    short_s: float
    long_s: float
    short_bytes: int
    long_bytes: int
    mode: str = "dirty-bitmap"
    most_bytes: int | None = None

    @classmethod
    def at_rate(cls, rate: int, most_bytes: int | None = None) -> Self:
        """A guest that writes so many bytes of pages a second, always others until there are no others."""
        return cls(_ONE_SECOND, 2 * _ONE_SECOND, rate, 2 * rate, "told", most_bytes)

    def in_time(self, seconds: float) -> float:
        """Bytes of different pages that are written in a time: ``h * (1 - x ** t)``."""
        if not self.short_bytes or not seconds:
            return 0.0
        turns = seconds / self.short_s
        if self._is_straight or (kept := self._kept) >= _SHRINKS:  # no bend to be seen
            written = self.long_bytes * seconds / self.long_s
        else:
            written = self.short_bytes / (1 - kept) * float(1 - kept**turns)
        return written if self.most_bytes is None else min(written, self.most_bytes)

    @property
    def _is_straight(self) -> bool:
        return self.long_bytes * self.short_s >= self.short_bytes * self.long_s

    @property
    def _kept(self) -> float:
        """The share of pages written again and again that a short time leaves out."""
        ratio = self.long_bytes / self.short_bytes
        turns = self.long_s / self.short_s
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if (1 - middle**turns) / (1 - middle) < ratio:
                low = middle
            else:
                high = middle
        return low

    def __str__(self) -> str:
        if self.mode == "told":
            most = "" if self.most_bytes is None else f", to {self.most_bytes / _MIB:.0f} MiB"
            return f"{self.short_bytes / self.short_s / _MIB:.0f} MiB/s{most}"
        short, long = self.short_bytes / _MIB, self.long_bytes / _MIB
        times = f"{short:.0f} MiB in {self.short_s:g} s, {long:.0f} in {self.long_s:g} s"
        return f"{times} ({self.mode})"


@dataclass(frozen=True, slots=True)
class Rounds:
    """A precopy, round by round.

    :ivar converges: it comes to a stop that is short enough.
    :ivar sent: bytes of each round; the first has nearly all memory.
    :ivar seconds: until the stop.
    :ivar left_bytes: what is sent during the stop, or would have to be.
    :ivar first_left_bytes: what is to be sent again after the first round.
    """

    converges: bool
    sent: tuple[float, ...]
    seconds: float
    left_bytes: float
    first_left_bytes: float


def rounds_of(memory_bytes: int, writes: Writes, bandwidth: int, enough_bytes: float) -> Rounds:
    """Reckon the rounds of a precopy.

    :param bandwidth: bytes a second, more than 0.
    :param enough_bytes: what may be left when the guest stops.
    """
    chunks = max(1, -(-memory_bytes // _CHUNK_BYTES))
    # From the protection of a chunk in the middle to the end; the first two are protected together.
    late = min(1.0, (chunks + 3) / (2 * chunks))
    chunk_s = memory_bytes / chunks / bandwidth
    held = writes.in_time(chunk_s * (1.5 - 1 / chunks))
    sent = [max(0.0, memory_bytes - held)]
    first_left: float | None = None
    while True:
        round_s = sent[-1] / bandwidth
        left = min(memory_bytes, max(writes.in_time(late * round_s), held if len(sent) == 1 else 0))
        first_left = left if first_left is None else first_left
        following = _next_round(memory_bytes, writes, bandwidth, late, round_s)
        converges = left <= enough_bytes
        if converges or following >= sent[-1] * _SHRINKS or len(sent) == _MOST_ROUNDS:
            return Rounds(converges, tuple(sent), sum(sent) / bandwidth, left, first_left)
        sent.append(following)


def _next_round(
    memory_bytes: int, writes: Writes, bandwidth: int, late: float, round_s: float
) -> float:
    """Bytes of the round after one that took so long: what is written meanwhile counts, too."""
    next_s = round_s
    for _ in range(_FIXED_POINT_STEPS):
        written = min(memory_bytes, writes.in_time(late * round_s + (1 - late) * next_s))
        next_s = written / bandwidth
    return next_s * bandwidth


@dataclass(frozen=True, slots=True)
class Faults:
    """What a guest waits for in postcopy.

    :ivar count: pages that it touches before they have come; those that it only reads come on top.
    :ivar wait_s: how long its vCPUs wait for them, all together.
    """

    count: int
    wait_s: float


def faults_of(missing_bytes: float, writes: Writes, seconds: float, latency_s: float) -> Faults:
    """Reckon the faults of a postcopy.

    Of what the guest touches meanwhile, half has come before: the push goes once through all that is
    missing.  A vCPU that waits touches nothing: it has no more faults than times to wait for one.

    :param seconds: until all has come. :param latency_s: until a page that is asked for is there.
    """
    touched = min(missing_bytes, writes.in_time(seconds)) / 2 / _PAGE_BYTES
    count = touched / (1 + touched * latency_s / seconds) if seconds else 0.0
    return Faults(round(count), count * latency_s)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a migration would take; ``None`` and infinite where it would not end.

    :ivar ram_bytes: of the guest, with pages of zeros, which cost nearly nothing: times are the longest.
    :ivar bandwidth, switchover_bandwidth: bytes a second, before and during the stop.
    :ivar bandwidth_from: ``told``, or the parameter that it is from.
    :ivar converges: whether a precopy comes to a stop of at most ``max_downtime_ms``.
    :ivar in_time: whether it does so within ``within_s``; the same as ``converges`` without such a time.
    :ivar rounds: of the precopy, over memory, until that stop, or until they shrink no more.
    :ivar precopy_s: until its end, with the stop.
    :ivar precopy_bytes: what it sends.
    :ivar downtime_ms: the stop, for memory alone: the state of devices comes on top.
    :ivar postcopy_s: until the end of a postcopy that begins at once.
    :ivar postcopy_late_s: and of one that begins after the first round.
    :ivar postcopy_late_bytes: what has not come when that one begins.
    """

    ram_bytes: int
    writes: Writes
    bandwidth: int
    switchover_bandwidth: int
    bandwidth_from: str
    max_downtime_ms: int
    within_s: float | None
    converges: bool
    in_time: bool
    rounds: int
    precopy_s: float | None
    precopy_bytes: int | None
    downtime_ms: int
    postcopy_s: float
    postcopy_late_s: float
    postcopy_late_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)

    def lines(self) -> Sequence[str]:
        """For a person to read."""
        stop = f"a stop of about {self.downtime_ms} ms (limit: {self.max_downtime_ms} ms)"
        if self.precopy_s is None:
            precopy = f"does not converge: after {self.rounds} rounds it would need {stop}"
        else:
            late = "" if self.in_time else f": later than {self.within_s:g} s"
            precopy = f"converges: {self.rounds} rounds, {self.precopy_s:.1f} s, {stop}{late}"
        left = self.postcopy_late_bytes / _MIB
        return (
            f"precopy {precopy}",
            f"postcopy at once: {self.postcopy_s:.1f} s, with the guest waiting for pages all the while",
            f"postcopy after the first round: {self.postcopy_late_s:.1f} s, {left:.0f} MiB to wait for",
            f"because of {self.ram_bytes / _MIB:.0f} MiB of RAM (pages of zeros cost less), "
            f"{self.bandwidth / _MIB:.0f} MiB/s ({self.bandwidth_from}), and a guest that writes "
            f"{self.writes}",
        )


def reckon(
    memory_bytes: int,
    writes: Writes,
    bandwidth: int,
    *,
    switchover_bandwidth: int = 0,
    bandwidth_from: str = "told",
    max_downtime_ms: int = 300,
    within_s: float | None = None,
) -> Estimate:
    """Reckon a precopy, and a postcopy.

    :param bandwidth: bytes a second, more than 0; ``switchover_bandwidth``: 0: the same.
    """
    switchover_bandwidth = switchover_bandwidth or bandwidth
    enough = switchover_bandwidth * max(max_downtime_ms, 1) / 1000
    found = rounds_of(memory_bytes, writes, bandwidth, enough)
    stop_s = found.left_bytes / switchover_bandwidth
    total_s = found.seconds + stop_s if found.converges else None
    late = found.first_left_bytes
    return Estimate(
        ram_bytes=memory_bytes,
        writes=writes,
        bandwidth=bandwidth,
        switchover_bandwidth=switchover_bandwidth,
        bandwidth_from=bandwidth_from,
        max_downtime_ms=max_downtime_ms,
        within_s=within_s,
        converges=found.converges,
        in_time=total_s is not None and total_s <= (math.inf if within_s is None else within_s),
        rounds=len(found.sent),
        precopy_s=total_s,
        precopy_bytes=round(sum(found.sent) + found.left_bytes) if found.converges else None,
        downtime_ms=round(stop_s * 1000),
        postcopy_s=memory_bytes / bandwidth,
        postcopy_late_s=(found.sent[0] + late) / bandwidth,
        postcopy_late_bytes=round(late),
    )
