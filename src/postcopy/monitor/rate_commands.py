"""The commands about how fast a guest writes to its memory; rows of the table of all commands."""

from collections.abc import Mapping
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
from postcopy.monitor.argument_types import Arguments, Struct, enumeration, integer
from postcopy.monitor.command import Command, Flag, Human
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_arguments import Argument, BadUsage, number, optional_number
from postcopy.monitor.hmp_info import Context, Lines
from postcopy.status import Status

_ARRIVED = frozenset({Status.NONE, Status.COMPLETED, Status.FAILED})


def _calc(backend: Backend, arguments: Arguments) -> None:
    info = backend.migration.info()
    if info.incoming and info.status not in _ARRIVED:
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
)  # fmt: skip
"""Rows for :data:`postcopy.monitor.commands.TABLE`."""
