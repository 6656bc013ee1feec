"""The layout of HMP's ``info migrate`` and its kin; the lines and their order are QEMU's."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from postcopy.monitor.addresses import uri_of_socket_address
from postcopy.parameters import Parameters, rules

_GLOBALS = (
    "globals:",
    "store-global-state: on",
    "only-migratable: off",
    "send-configuration: on",
    "send-section-footer: on",
    "send-switchover-start: off",
    "clear-bitmap-shift: 18",
)

# (member, line); the next two tables: only when there is something to tell
_TIMES = (
    ("expected-downtime", "expected downtime: {} ms"),
    ("downtime", "downtime: {} ms"),
    ("setup-time", "setup: {} ms"),
)
_RAM = (
    ("transferred", "transferred ram: {k} kbytes"),
    ("mbps", "throughput: {:.2f} mbps"),
    ("remaining", "remaining ram: {k} kbytes"),
    ("total", "total ram: {k} kbytes"),
    ("duplicate", "duplicate: {} pages"),
    ("normal", "normal: {} pages"),
    ("normal-bytes", "normal bytes: {k} kbytes"),
    ("dirty-sync-count", "dirty sync count: {}"),
    ("page-size", "page size: {k} kbytes"),
    ("multifd-bytes", "multifd bytes: {k} kbytes"),
    ("pages-per-second", "pages-per-second: {}"),
)
_RAM_IF_ANY = (
    ("dirty-pages-rate", "dirty pages rate: {} pages"),
    ("postcopy-requests", "postcopy request count: {}"),
    ("precopy-bytes", "precopy ram: {k} kbytes"),
    ("downtime-bytes", "downtime ram: {k} kbytes"),
    ("postcopy-bytes", "postcopy ram: {k} kbytes"),
    ("dirty-sync-missed-zero-copy", "Zero-copy-send fallbacks happened: {} times"),
)
_OTHER = (
    ("cpu-throttle-percentage", "cpu throttle percentage: {}"),
    ("postcopy-blocktime", "postcopy blocktime: {}"),
    ("postcopy-vcpu-blocktime", "postcopy vcpu blocktime: {ranges}"),
    ("postcopy-latency", "postcopy latency: {} ns"),
    ("postcopy-non-vcpu-latency", "postcopy non-vcpu latency: {} ns"),
    ("postcopy-vcpu-latency", "postcopy vcpu latencies: {list}"),
)
_UNITS = ("us", "ms", "sec")


def _lines(table: Iterable[tuple[str, str]], values: Mapping[str, Any]) -> Iterator[str]:
    for member, layout in table:
        if member in values:
            yield _filled(layout, values[member])


def _filled(layout: str, value: Any) -> str:
    if "{k}" in layout:
        return layout.format(k=value >> 10)
    if "{ranges}" in layout:
        return layout.format(ranges=ranges(value))
    if "{list}" in layout:
        return layout.format(list=",".join(map(str, value)))
    return layout.format(value)


def ranges(numbers: Iterable[int]) -> str:
    """QEMU's way to print a list: sorted, each number once, runs as ``a-b``."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def migrate(info: Mapping[str, Any]) -> Iterator[str]:
    """The lines of ``info migrate`` for an answer of ``query-migrate``."""
    yield from _GLOBALS
    if "blocked-reasons" in info:
        yield "Outgoing migration blocked:"
        yield from (f"  {reason}" for reason in info["blocked-reasons"])
    if "status" in info:
        failed = info["status"] == "failed" and "error-desc" in info
        yield f"Migration status: {info['status']}" + (f" ({info['error-desc']})" if failed else "")
        yield f"total time: {info.get('total-time', 0)} ms"
        yield from _lines(_TIMES, info)
    if "ram" in info:
        yield from _lines(_RAM, info["ram"])
        yield from _lines(_RAM_IF_ANY, {k: v for k, v in info["ram"].items() if v})
    yield from _lines(_OTHER, info)
    yield from _latencies(info.get("postcopy-latency-dist", ()))
    if "socket-address" in info:
        yield "socket address: ["
        yield from (f"\t{uri_of_socket_address(a)}" for a in info["socket-address"])
        yield "]"
    yield from (f"x-postcopy {k}: {v}" for k, v in info.get("x-postcopy", {}).items())


def _latencies(counts: Iterable[int]) -> Iterator[str]:
    for bucket, count in enumerate(counts):
        if bucket == 0:
            yield "postcopy latency distribution:"
        yield f"  [ {_power_of_two(bucket)} - {_power_of_two(bucket + 1)} ]: {count}"


def _power_of_two(exponent: int) -> str:
    # 2**10 us is called 1 ms and 2**20 us 1 sec, as QEMU does.
    return f"{1 << exponent % 10} {_UNITS[exponent // 10]}"


# In the order in which QEMU prints them.
_PARAMETERS = (
    ("announce-initial", "{} ms"),
    ("announce-max", "{} ms"),
    ("announce-rounds", "{}"),
    ("announce-step", "{} ms"),
    ("throttle-trigger-threshold", "{}"),
    ("cpu-throttle-initial", "{}"),
    ("cpu-throttle-increment", "{}"),
    ("cpu-throttle-tailslow", "{}"),
    ("max-cpu-throttle", "{}"),
    ("tls-creds", "'{}'"),
    ("tls-hostname", "'{}'"),
    ("max-bandwidth", "{} bytes/second"),
    ("avail-switchover-bandwidth", "{} bytes/second"),
    ("downtime-limit", "{} ms"),
    ("x-checkpoint-delay", "{} ms"),
    ("multifd-channels", "{}"),
    ("multifd-compression", "{}"),
    ("zero-page-detection", "{}"),
    ("xbzrle-cache-size", "{} bytes"),
    ("max-postcopy-bandwidth", "{}"),
    ("tls-authz", "'{}'"),
    ("x-vcpu-dirty-limit-period", "{} ms"),
    ("vcpu-dirty-limit", "{} MB/s"),
    ("mode", "{}"),
    ("direct-io", "{}"),
)


def parameters(values: Parameters) -> Iterator[str]:
    """The lines of ``info migrate_parameters``: QEMU's, then ours."""
    by_name = values.to_qapi()
    ours = tuple((name, "{}") for name, rule in rules().items() if rule.ours)
    for name, layout in (*_PARAMETERS, *ours):
        yield f"{name}: {layout.format(on_off(by_name[name]))}"


def on_off(value: object) -> object:
    """Booleans as people write them; anything else as it is."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value
