"""The figures of a migration that has completed, for a person."""

from collections.abc import Iterator

from postcopy.client.result import Result

_MIB = 1 << 20


def lines(result: Result) -> Iterator[tuple[str, str]]:
    """What was measured, and how much of it."""
    yield "total time", f"{result.total_ms / 1000:.2f} s"
    yield "downtime, by the source", f"{result.downtime_ms:.1f} ms"
    yield "precopy rounds", str(result.rounds)
    yield (
        "sent",
        f"{result.transferred_bytes / _MIB:.0f} MiB: {result.precopy_bytes / _MIB:.0f} precopy, "
        f"{result.postcopy_bytes / _MIB:.0f} postcopy",
    )
    yield (
        "pages",
        f"{result.normal_pages} with data, {result.zero_pages} zero, "
        f"{result.requested_pages} asked for by the destination",
    )
    if not result.postcopy_bytes:
        return
    latency = result.fault_latency
    if latency is not None:
        ms = [f"{us / 1000:.2f}" for us in (latency.p50_us, latency.p99_us, latency.max_us)]
        yield "page-fault latency", f"p50 {ms[0]} ms, p99 {ms[1]} ms, max {ms[2]} ms"
    for vcpu, blocked_ms in enumerate(result.blocktime_ms):
        yield f"blocktime of vCPU {vcpu}", f"{blocked_ms:.1f} ms"
    if result.overlapped_blocktime_ms is not None:
        yield "blocktime of all at once", f"{result.overlapped_blocktime_ms:.1f} ms"


def text(rows: list[tuple[str, str]]) -> str:
    """The rows as one aligned block."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
