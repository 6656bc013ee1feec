"""What a migration would take, before one is begun; nothing of the machine is changed.

The machine measures twice how much its guest writes (``calc-dirty-rate``), over a short time and over a
longer one, and :mod:`postcopy.client.migration_model` reckons with that.
"""

import asyncio
from typing import Any, Final

from postcopy.client.memory_check import ram_bytes
from postcopy.client.migration_model import Estimate, Writes, reckon
from postcopy.client.qmp import QmpConnection
from postcopy.errors import PostcopyError, Refused, WrongState

_MIB: Final = 1 << 20
_TIMES_MS: Final = (250, 1000)
_TIMES_OLD_MS: Final = (1000, 2000)  # QEMU 7.2 has whole seconds
_MODES: Final = ("dirty-bitmap", "dirty-ring", "page-sampling")
_POLL_S: Final = 0.02
_PATIENCE_S: Final = 30.0
_BUSY: Final = frozenset(
    {"setup", "active", "device", "pre-switchover", "cancelling", "postcopy-active"}
    | {"postcopy-paused", "postcopy-recover", "postcopy-recover-setup", "postcopy-device"}
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
