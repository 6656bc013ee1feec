"""What a migration would take, before one is begun; nothing of the machine is changed.

The machine measures twice how much its guest writes (``calc-dirty-rate``), over a short time and over a
longer one. A guest that writes the same pages again and again writes less in the second than its rate
times the time. Of both follows a curve that bends towards the size of what is written again and again,
and the rounds of a precopy are reckoned with that curve.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from postcopy.client.memory_check import ram_bytes
from postcopy.client.qmp import QmpConnection
from postcopy.errors import PostcopyError, Refused, WrongState

_MIB: Final = 1 << 20
_TIMES_MS: Final = (250, 1000)
_TIMES_OLD_MS: Final = (1000, 2000)  # QEMU 7.2 has whole seconds
_MODES: Final = ("dirty-bitmap", "dirty-ring", "page-sampling")
_POLL_S: Final = 0.02
_PATIENCE_S: Final = 30.0
_MOST_ROUNDS: Final = 1000
_SHRINKS: Final = 0.99
_BUSY: Final = frozenset(
    {"setup", "active", "device", "pre-switchover", "cancelling", "postcopy-active"}
    | {"postcopy-paused", "postcopy-recover", "postcopy-recover-setup", "postcopy-device"}
)


@dataclass(frozen=True, slots=True)
class Writes:
    """How much a guest writes: two measurements.

    :ivar short_s, long_s: how long was measured.
    :ivar short_bytes, long_bytes: the different pages that were written in that time.
    :ivar mode: of ``calc-dirty-rate``.
    """

    short_s: float
    long_s: float
    short_bytes: int
    long_bytes: int
    mode: str = "dirty-bitmap"

    def in_time(self, seconds: float) -> float:
        """Bytes of different pages that are written in a time: ``h * (1 - x ** t)``."""
        if not self.short_bytes or not seconds:
            return 0.0
        kept = self._kept
        turns = seconds / self.short_s
        if kept >= _SHRINKS:  # no bend to be seen
            return self.long_bytes * seconds / self.long_s
        return self.short_bytes / (1 - kept) * float(1 - kept**turns)

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
    downtime_ms: int
    postcopy_s: float
    postcopy_late_s: float
    postcopy_late_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)

    def lines(self) -> Sequence[str]:
        """For a person to read."""
        writes = self.writes
        stop = f"a stop of about {self.downtime_ms} ms (limit: {self.max_downtime_ms} ms)"
        if self.precopy_s is None:
            precopy = f"does not converge: after {self.rounds} rounds it would need {stop}"
        else:
            late = "" if self.in_time else f": later than {self.within_s:g} s"
            precopy = f"converges: {self.rounds} rounds, {self.precopy_s:.1f} s, {stop}{late}"
        left = self.postcopy_late_bytes / _MIB
        short, long = writes.short_bytes / _MIB, writes.long_bytes / _MIB
        times = f"{short:.0f} MiB in {writes.short_s:g} s, {long:.0f} in {writes.long_s:g} s"
        wrote = f"{times} ({writes.mode})"
        return (
            f"precopy {precopy}",
            f"postcopy at once: {self.postcopy_s:.1f} s, with the guest waiting for pages all the while",
            f"postcopy after the first round: {self.postcopy_late_s:.1f} s, {left:.0f} MiB to wait for",
            f"because of {self.ram_bytes / _MIB:.0f} MiB of RAM (pages of zeros cost less), "
            f"{self.bandwidth / _MIB:.0f} MiB/s ({self.bandwidth_from}), and a guest that writes {wrote}",
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
    """Reckon the rounds of a precopy, and a postcopy.

    :param bandwidth: bytes a second, more than 0; ``switchover_bandwidth``: 0: the same.
    """
    switchover_bandwidth = switchover_bandwidth or bandwidth
    enough = switchover_bandwidth * max(max_downtime_ms, 1) / 1000
    seconds = memory_bytes / bandwidth
    late = left = min(memory_bytes, writes.in_time(seconds))
    rounds, converges = 1, True
    while left > enough:
        more = min(memory_bytes, writes.in_time(left / bandwidth))
        if more >= left * _SHRINKS or rounds == _MOST_ROUNDS:
            converges = False
            break
        seconds, left, rounds = seconds + left / bandwidth, more, rounds + 1
    stop_s = left / switchover_bandwidth
    total_s = seconds + stop_s if converges else None
    return Estimate(
        ram_bytes=memory_bytes,
        writes=writes,
        bandwidth=bandwidth,
        switchover_bandwidth=switchover_bandwidth,
        bandwidth_from=bandwidth_from,
        max_downtime_ms=max_downtime_ms,
        within_s=within_s,
        converges=converges,
        in_time=total_s is not None and total_s <= (math.inf if within_s is None else within_s),
        rounds=rounds,
        precopy_s=total_s,
        downtime_ms=round(stop_s * 1000),
        postcopy_s=memory_bytes / bandwidth,
        postcopy_late_s=(memory_bytes + late) / bandwidth,
        postcopy_late_bytes=round(late),
    )


async def estimate(
    machine: QmpConnection,
    *,
    bandwidth: int | None = None,
    max_downtime_ms: int = 300,
    within_s: float | None = None,
) -> Estimate:
    """Estimate what a migration of a machine's guest would take; a few seconds.

    :param bandwidth: bytes a second; None: the machine's parameters say.
    :raises WrongState: a migration is under way.
    :raises Refused: the machine tells neither its memory nor its rate, or has no limit of bandwidth.
    """
    status = (await machine.execute("query-migrate")).get("status")
    if status in _BUSY:
        raise WrongState(f"a migration is under way ({status}); there is nothing to estimate")
    parameters = await machine.execute("query-migrate-parameters")
    limit, source = bandwidth, "told"
    if not limit:
        limit, source = parameters.get("max-bandwidth", 0), "max-bandwidth"
    if not limit:
        raise Refused(
            "the machine has no limit of bandwidth (max-bandwidth is 0); give --bandwidth"
        )
    writes = await measure(machine)
    return reckon(
        await ram_bytes(machine),
        writes,
        limit,
        switchover_bandwidth=parameters.get("avail-switchover-bandwidth", 0),
        bandwidth_from=source,
        max_downtime_ms=max_downtime_ms,
        within_s=within_s,
    )


async def measure(machine: QmpConnection) -> Writes:
    """Have a machine measure how much its guest writes, by the most exact mode that it has.

    :raises Refused: it has none, or one is being measured.
    """
    for mode in _MODES:
        try:
            short, unit = await _begin(machine, mode)
        except Refused as error:
            if "is not enabled" not in str(error) or mode == _MODES[-1]:
                raise
            continue
        times = _TIMES_MS if unit == "millisecond" else _TIMES_OLD_MS
        first = await _rate(machine, short)
        await machine.execute("calc-dirty-rate", _arguments(mode, times[1], unit))
        second = await _rate(machine, times[1])
        short_s, long_s = times[0] / 1000, times[1] / 1000
        return Writes(short_s, long_s, round(first * short_s), round(second * long_s), mode)
    raise AssertionError("the last mode was refused, and no error came of it")


async def _begin(machine: QmpConnection, mode: str) -> tuple[int, str]:
    try:
        await machine.execute("calc-dirty-rate", _arguments(mode, _TIMES_MS[0], "millisecond"))
    except Refused as error:
        if "calc-time-unit" not in str(error):
            raise
        await machine.execute("calc-dirty-rate", _arguments(mode, _TIMES_OLD_MS[0], "second"))
        return _TIMES_OLD_MS[0], "second"
    return _TIMES_MS[0], "millisecond"


def _arguments(mode: str, time_ms: int, unit: str) -> dict[str, Any]:
    if unit == "second":
        return {"calc-time": time_ms // 1000, "mode": mode}
    return {"calc-time": time_ms, "calc-time-unit": unit, "mode": mode}


async def _rate(machine: QmpConnection, time_ms: int) -> int:
    """The bytes a second of a measurement under way, once it has ended."""
    # A QEMU that has just been told shows the measurement before for a moment.
    await asyncio.sleep(time_ms / 1000)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while (found := await machine.execute("query-dirty-rate"))["status"] != "measured":
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise PostcopyError(
            f"the machine has not measured its dirty rate within {_PATIENCE_S:g} s"
        ) from None
    return int(found["dirty-rate"]) * _MIB
