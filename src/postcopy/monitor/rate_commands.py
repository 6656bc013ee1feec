"""The commands about how fast a guest writes to its memory; rows of the table of all commands."""

from collections.abc import Mapping, Sequence
from typing import Any

from postcopy.errors import WrongState
from postcopy.machine.dirty_rate import (
    DIRTY_BITMAP,
    DIRTY_RING,
    MILLISECONDS,
    MODES,
    PAGE_SAMPLING,
    Order,
)
from postcopy.monitor.argument_types import Arguments, Struct, enumeration, integer, size
from postcopy.monitor.command import Command, Flag, Human
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_arguments import Argument, BadUsage, number, optional_number
from postcopy.monitor.hmp_info import Context, Lines
from postcopy.parameters import Capability
from postcopy.status import Status

_ENDED = frozenset({Status.NONE, Status.COMPLETED, Status.FAILED, Status.CANCELLED})


def _calc(backend: Backend, arguments: Arguments) -> None:
    info = backend.migration.info()
    if info.incoming and info.status not in _ENDED:
        raise WrongState(
            "the guest's memory is still arriving: that would be measured; measure when it is here"
        )
    backend.machine.dirty_rate.start(
        Order(
            arguments["calc-time"],
            arguments.get("calc-time-unit", "second"),
            arguments.get("sample-pages"),
            arguments.get("mode", PAGE_SAMPLING),
        )
    )


def _set_limit(backend: Backend, arguments: Arguments) -> None:
    _check_free(backend, "set")
    backend.machine.dirty_limit.set(arguments["dirty-rate"], arguments.get("cpu-index"))


def _cancel_limit(backend: Backend, arguments: Arguments) -> None:
    _check_free(backend, "cancel")
    backend.machine.dirty_limit.cancel(arguments.get("cpu-index"))


def _check_free(backend: Backend, what: str) -> None:
    """Refuse to change a limit that a migration has set."""
    info = backend.migration.info()
    under_way = not info.incoming and info.status not in _ENDED
    limited = backend.migration.capabilities.enabled(Capability.DIRTY_LIMIT)
    if under_way and limited and backend.machine.dirty_limit.query():
        raise WrongState(f"can't {what} dirty page rate limit while migration is running")


def _calc_arguments(line: Arguments) -> Arguments:
    if line["second"] <= 0:
        raise BadUsage("Incorrect period length specified!", hint=False)
    if line["r"] and line["b"]:
        raise BadUsage("Either dirty ring or dirty bitmap can be specified!", hint=False)
    mode = DIRTY_RING if line["r"] else DIRTY_BITMAP if line["b"] else PAGE_SAMPLING
    samples = line["sample_pages_per_GB"]
    given = {} if samples is None else {"sample-pages": samples}
    return {"calc-time": line["second"], "mode": mode, **given}


def _started(_context: Context, _answer: object, line: Arguments) -> Lines:
    yield f"Starting dirty rate measurement with period {line['second']} seconds"
    yield "[Please use 'info dirty_rate' to check results]"


def _rate(_context: Context, found: Mapping[str, Any], _line: Arguments) -> Lines:
    """The lines of ``info dirty_rate``; the start is in seconds, whatever QEMU prints behind it."""
    yield f"Status: {found['status']}"
    yield f"Start Time: {found['start-time']} (ms)"
    if found["mode"] == PAGE_SAMPLING:
        yield f"Sample Pages: {found['sample-pages']} (per GB)"
    yield f"Period: {found['calc-time']} (sec)"
    yield f"Mode: {found['mode']}"
    if "dirty-rate" not in found:
        yield "Dirty rate: (not ready)"
        return
    yield f"Dirty rate: {found['dirty-rate']} (MB/s)"
    for vcpu in found.get("vcpu-dirty-rate", ()):
        yield f"vcpu[{vcpu['id']}], Dirty rate: {vcpu['dirty-rate']} (MB/s)"


def _cpu(line: Arguments) -> Arguments:
    return {} if line["cpu_index"] is None else {"cpu-index": line["cpu_index"]}


def _limits(_context: Context, found: Sequence[Mapping[str, Any]], _line: Arguments) -> Lines:
    if not found:
        yield "Dirty page limit not enabled!"
    for each in found:
        yield (
            f"vcpu[{each['cpu-index']}], limit rate {each['limit-rate']} (MB/s), "
            f"current rate {each['current-rate']} (MB/s)"
        )


_CPU_INDEX = Argument("cpu_index", optional_number, "[cpu_index]")
_UNIT = enumeration(*MILLISECONDS)

RATES = (
    Command(
        "calc-dirty-rate", "begin to measure how fast the guest writes to its memory", _calc,
        Struct(
            {"calc-time": integer},
            {"calc-time-unit": _UNIT, "sample-pages": integer, "mode": enumeration(*MODES)},
        ),
        Human(
            arguments=(
                Argument("second", number),
                Argument("sample_pages_per_GB", optional_number, "[sample_pages_per_GB]"),
            ),
            flags=(
                Flag("r", "mode dirty-ring"),
                Flag("b", "mode dirty-bitmap"),
            ),
            members=_calc_arguments, show=_started,
        ),
    ),
    Command(
        "query-dirty-rate", "how fast the guest writes, in MiB a second",
        lambda b, a: b.machine.dirty_rate.query(a.get("calc-time-unit", "second")),
        Struct(optional={"calc-time-unit": _UNIT}),
        Human(show=_rate),
    ),
    Command(
        "set-vcpu-dirty-limit", "hold vCPUs to a dirty rate, in MiB a second; 0: no more",
        _set_limit,
        Struct({"dirty-rate": size}, {"cpu-index": integer}),
        Human(
            arguments=(Argument("dirty_rate", number), _CPU_INDEX),
            members=lambda line: {"dirty-rate": line["dirty_rate"], **_cpu(line)},
        ),
    ),
    Command(
        "cancel-vcpu-dirty-limit", "hold vCPUs to no dirty rate any more",
        _cancel_limit,
        Struct(optional={"cpu-index": integer}),
        Human(
            arguments=(_CPU_INDEX,), members=_cpu,
            show=lambda _c, _a, _l: (
                "[Please use 'info vcpu_dirty_limit' to query dirty limit for virtual CPU]",
            ),
        ),
    ),
    Command(
        "query-vcpu-dirty-limit", "the limits of dirty rates, and the present rate of all vCPUs together",
        lambda b, _: b.machine.dirty_limit.query(),
        human=Human(show=_limits),
    ),
)  # fmt: skip
"""Rows for :data:`postcopy.monitor.commands.TABLE`."""
