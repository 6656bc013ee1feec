"""The figures of a completed migration."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class FaultLatency:
    """How long a vCPU waited for a missing page, in microseconds."""

    p50_us: int
    p99_us: int
    max_us: int


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of a migration that has completed.

    The destination's figures (from ``blocktime_ms`` on) are empty or None if its machine is not known, or
    if the migration had no postcopy.

    :ivar downtime_ms: how long no vCPU ran, as measured by the source.
    :ivar rounds: precopy rounds that were begun.
    :ivar blocktime_ms: for each vCPU, how long it waited for pages.
    :ivar overlapped_blocktime_ms: how long all of them waited at once.
    :ivar source, destination: the last answers to ``query-migrate``, whole.
    """

    total_ms: int
    setup_ms: int
    downtime_ms: float
    rounds: int
    transferred_bytes: int
    precopy_bytes: int
    postcopy_bytes: int
    normal_pages: int
    zero_pages: int
    requested_pages: int
    blocktime_ms: tuple[float, ...] = ()
    overlapped_blocktime_ms: float | None = None
    fault_latency: FaultLatency | None = None
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)
    destination: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, source: Mapping[str, Any], destination: Mapping[str, Any]) -> Self:
        """Make it of the answers of both sides; ``destination`` may be empty."""
        ram = source.get("ram", {})
        measured = destination.get("x-postcopy", {})
        downtime_us = source.get("x-postcopy", {}).get("guest-downtime-us")
        return cls(
            total_ms=source.get("total-time", 0),
            setup_ms=source.get("setup-time", 0),
            downtime_ms=source.get("downtime", 0) if downtime_us is None else downtime_us / 1000,
            rounds=ram.get("dirty-sync-count", 0),
            transferred_bytes=ram.get("transferred", 0),
            precopy_bytes=ram.get("precopy-bytes", 0),
            postcopy_bytes=ram.get("postcopy-bytes", 0),
            normal_pages=ram.get("normal", 0),
            zero_pages=ram.get("duplicate", 0),
            requested_pages=ram.get("postcopy-requests", 0),
            blocktime_ms=_blocktime_ms(destination, measured),
            overlapped_blocktime_ms=_overlapped_ms(destination, measured),
            fault_latency=fault_latency(measured),
            source=source,
            destination=destination,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it, without the raw answers."""
        figures = asdict(self)
        del figures["source"], figures["destination"]
        return figures


def _blocktime_ms(destination: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[float, ...]:
    # Ours are in microseconds, QEMU's in whole milliseconds.
    if "blocktime-us" in measured:
        return tuple(us / 1000 for us in measured["blocktime-us"])
    return tuple(float(ms) for ms in destination.get("postcopy-vcpu-blocktime", ()))


def _overlapped_ms(destination: Mapping[str, Any], measured: Mapping[str, Any]) -> float | None:
    if "overlapped-blocktime-us" in measured:
        return float(measured["overlapped-blocktime-us"]) / 1000
    return destination.get("postcopy-blocktime")


def fault_latency(measured: Mapping[str, Any]) -> FaultLatency | None:
    """Make it of the members of ``x-postcopy``; None if they are missing."""
    names = [f"fault-latency-{part}-us" for part in ("p50", "p99", "max")]
    if not all(name in measured for name in names):
        return None
    return FaultLatency(*(measured[name] for name in names))
