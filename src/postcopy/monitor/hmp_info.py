"""What HMP prints: of the answers of QMP's queries, and of guest memory; lines and order are QEMU's."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postcopy.errors import Refused
from postcopy.guest import Region
from postcopy.monitor import memory_dump
from postcopy.monitor.addresses import uri_of_socket_address
from postcopy.monitor.argument_types import Arguments
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_arguments import DumpFormat
from postcopy.parameters import rules
from postcopy.status import Status

_POLL_SECONDS = 0.1
_UNDER_WAY = frozenset(
    {Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.POSTCOPY_DEVICE, Status.CANCELLING}
)

_GLOBALS = (
    "Globals:",
    "  store-global-state: on",
    "  only-migratable: off",
    "  send-configuration: on",
    "  send-section-footer: on",
    "  send-switchover-start: off",
    "  clear-bitmap-shift: 18",
)

# (member, how it is called): those that there are, on one line
_TIMES = (
    ("total-time", "total"),
    ("setup-time", "setup"),
    ("expected-downtime", "exp_down"),
    ("downtime", "down"),
)
_OTHERS = (
    ("postcopy-requests", "postcopy_req"),
    ("downtime-bytes", "downtime_bytes"),
    ("dirty-sync-missed-zero-copy", "zerocopy_fallbacks"),
)
_POSTCOPY = (
    ("postcopy-blocktime", "Postcopy Blocktime (ms): {}"),
    ("postcopy-vcpu-blocktime", "Postcopy vCPU Blocktime (ms):\n {}"),
    ("postcopy-latency", "Postcopy Latency (ns): {}"),
    ("postcopy-non-vcpu-latency", "Postcopy non-vCPU Latency (ns): {}"),
    ("postcopy-vcpu-latency", "Postcopy vCPU Latencies (ns):\n {}"),
)
_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


Lines = Iterable[str]


@dataclass(slots=True)
class Context:
    """One user of HMP: what its commands work on, and what ``xp`` remembers from one call to the next."""

    backend: Backend
    interactive: bool
    dump_form: str = "x"
    dump_size_bytes: int = 4


def size(n_bytes: int) -> str:
    """Three digits with a unit, as QEMU: ``64.1 MiB``; from 1000 of a unit on the next one is taken."""
    power = 0
    while n_bytes >= 1000 << 10 * power and power + 1 < len(_UNITS):
        power += 1
    return f"{n_bytes / (1 << 10 * power):.3g} {_UNITS[power]}B"


def ram_blocks(regions: Sequence[Region]) -> Iterator[str]:
    """The lines of ``info ramblock``."""
    form = "{:>24} {:>8}  {:>18} {:>18} {:>18} {:>18} {:>3}".format
    yield form("Block Name", "PSize", "Offset", "Used", "Total", "HVA", "RO")
    offset = 0
    for region in regions:
        numbers = (offset, region.size_bytes, region.size_bytes, region.host_address)
        page_size = size(region.page_size_bytes)
        yield form(region.name, page_size, *(f"{number:#018x}" for number in numbers), "rw")
        offset += region.size_bytes


def migrate(_context: Context, info: Mapping[str, Any], arguments: Arguments) -> Lines:
    """The lines of ``info migrate``; with ``-a`` the globals and what a postcopy has measured too."""
    if "blocked-reasons" in info:
        yield "Outgoing migration blocked:"
        yield from (f"  {reason}" for reason in info["blocked-reasons"])
    if "status" in info:
        why = f" ({info['error-desc']})" if "error-desc" in info else ""
        yield f"Status: \t\t{info['status']}{why}"
    if "total-time" in info:
        yield f"Time (ms): \t\t{_named(_TIMES, info)}"
    if "remaining" in info:
        yield f"Remaining: \t\t{size(info['remaining'])}"
    if "socket-address" in info:
        yield "Sockets: ["
        yield from (f"\t{uri_of_socket_address(a)}" for a in info["socket-address"])
        yield "]"
    if "ram" in info:
        yield from _ram(info["ram"])
    yield from _savings(info)
    if ours := info.get("x-postcopy"):
        yield "x-postcopy:"
        yield from (f"  {name}: {value}" for name, value in ours.items())
    if arguments["a"]:
        yield from _GLOBALS
        yield from _postcopy(info)


def _savings(info: Mapping[str, Any]) -> Iterator[str]:
    if cache := info.get("xbzrle-cache"):
        figures = "size={cache-size}, transferred={bytes}, pages={pages}, miss={cache-miss}"
        rates = "miss_rate={cache-miss-rate:.2f}, encode_rate={encoding-rate:.2f}"
        yield f"XBZRLE: {figures.format(**cache)}"
        yield f"  {rates.format(**cache)}, overflow={cache['overflow']}"
    if held := info.get("cpu-throttle-percentage"):
        yield f"CPU Throttle (%): {held}"


def _ram(ram: Mapping[str, Any]) -> Iterator[str]:
    sizes = {name: size(value) for name, value in ram.items() if isinstance(value, int)}
    dirty = f", dirty={ram['dirty-pages-rate']}" if ram["dirty-pages-rate"] else ""
    others = _named(_OTHERS, {name: value for name, value in ram.items() if value})
    yield "RAM info:"
    yield f"  Throughput (Mbps): \t{ram['mbps']:.2f}"
    yield f"  Sizes: \t\tpagesize={sizes['page-size']}, total={sizes['total']}"
    yield f"  Transfers: \t\ttransferred={sizes['transferred']}, remain={sizes['remaining']}"
    yield (
        f"    Channels: \t\tprecopy={sizes['precopy-bytes']},"
        f" multifd={sizes['multifd-bytes']}, postcopy={sizes['postcopy-bytes']}"
    )
    yield f"    Page Types: \tnormal={ram['normal']}, zero={ram['duplicate']}"
    yield f"  Page Rates (pps): \ttransfer={ram['pages-per-second']}{dirty}"
    yield f"  Others: \t\tdirty_syncs={ram['dirty-sync-count']}" + (f", {others}" if others else "")


def _named(table: Iterable[tuple[str, str]], values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={values[member]}" for member, name in table if member in values)


def _postcopy(info: Mapping[str, Any]) -> Iterator[str]:
    for member, layout in _POSTCOPY:
        if member in info:
            yield from layout.format(info[member]).splitlines()
    if counts := info.get("postcopy-latency-dist"):
        yield "Postcopy Latency Distribution:"
        for bucket, count in enumerate(counts):
            least, most = _microseconds(1 << bucket), _microseconds(2 << bucket)
            yield f"  [ {least:>8} - {most:>8} ]: {count:>10}"


def _microseconds(value: int) -> str:
    for unit in ("us", "ms"):
        if value < 1000:
            return f"{value} {unit}"
        value //= 1000
    return f"{value} sec"


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
    ("tls-authz", "'{}'"),
    ("max-bandwidth", "{} bytes/second"),
    ("avail-switchover-bandwidth", "{} bytes/second"),
    ("max-postcopy-bandwidth", "{} bytes/second"),
    ("downtime-limit", "{} ms"),
    ("x-checkpoint-delay", "{} ms"),
    ("multifd-channels", "{}"),
    ("multifd-compression", "{}"),
    ("zero-page-detection", "{}"),
    ("xbzrle-cache-size", "{} bytes"),
    ("x-vcpu-dirty-limit-period", "{} ms"),
    ("vcpu-dirty-limit", "{} MB/s"),
    ("mode", "{}"),
    ("direct-io", "{}"),
    ("x-rdma-chunk-size", "{} bytes"),
)


def parameters(_context: Context, by_name: Mapping[str, Any], _arguments: Arguments) -> Lines:
    """The lines of ``info migrate_parameters``: QEMU's, then ours."""
    for name, layout in _PARAMETERS:
        yield f"{name}: {layout.format(_on_off(by_name[name]))}"
    yield "".join(["cpr-exec-command:", *(f" {word}" for word in by_name["cpr-exec-command"])])
    for name, rule in rules().items():
        if rule.ours:
            yield f"{name}: {_on_off(by_name[name])}"


def capabilities(_context: Context, rows: list[dict[str, Any]], _arguments: Arguments) -> Lines:
    """The lines of ``info migrate_capabilities``."""
    return (f"{row['capability']}: {_on_off(row['state'])}" for row in rows)


def status(_context: Context, found: Mapping[str, Any], _arguments: Arguments) -> Lines:
    """The line of ``info status``."""
    running, state = found["running"], found["status"]
    line = f"VM status: {'running' if running else 'paused'}"
    yield line if running or state == "paused" else f"{line} ({state})"


def cpus(_context: Context, rows: list[dict[str, Any]], _arguments: Arguments) -> Lines:
    """The lines of ``info cpus``."""
    for row in rows:
        mark = "*" if row["cpu-index"] == 0 else " "
        yield f"{mark} CPU #{row['cpu-index']}: thread_id={row['thread-id']}"


def version(_context: Context, found: Mapping[str, Any], _arguments: Arguments) -> Lines:
    """The line of ``info version``."""
    yield "{major}.{minor}.{micro}".format(**found["qemu"]) + f" ({found['package']})"


def _on_off(value: object) -> object:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def wait_for_the_end(context: Context, _: object, arguments: Arguments) -> Lines:
    """Wait for the end of a migration, unless ``-d`` was given; the line of its error."""
    if arguments["d"] or not context.interactive:
        return
    pause = threading.Event()
    while (info := context.backend.migration.info()).status in _UNDER_WAY:
        pause.wait(_POLL_SECONDS)
    if info.status is Status.FAILED and info.error_desc:
        yield f"Error: {info.error_desc}"


def reset_point(_context: Context, done: Mapping[str, Any], _: Arguments) -> Lines:
    """The line of ``x_reset_point``."""
    yield f"copied: {done['copied-bytes'] >> 10} kbytes, paused: {done['pause-us']} us"


def reset(_context: Context, done: Mapping[str, Any], _: Arguments) -> Lines:
    """The line of ``x_reset``."""
    yield f"pages: {done['pages']}, paused: {done['us']} us"


def gpa2hva(context: Context, _: object, arguments: Arguments) -> Lines:
    """The line of ``gpa2hva``."""
    address, machine = arguments["addr"], context.backend.machine
    try:
        host_address = machine.host_address(address)
    except Refused:
        yield f"No memory is mapped at address {address:#x}"
        return
    name = machine.block_at(address)
    yield f"Host virtual address for {address:#x} ({name}) is {host_address:#x}"


def xp(context: Context, _: object, arguments: Arguments) -> Lines:
    """The lines of ``xp``; it goes on in the form of the last time."""
    asked: DumpFormat = arguments["fmt"]
    if (asked.form or context.dump_form) == "i":
        raise Refused("format 'i' is not implemented: this monitor has no disassembler")
    context.dump_form = asked.form or context.dump_form
    context.dump_size_bytes = asked.size_bytes or context.dump_size_bytes
    return memory_dump.dump(
        context.backend.machine.read_physical,
        arguments["addr"],
        asked.count,
        context.dump_form,
        context.dump_size_bytes,
    )
