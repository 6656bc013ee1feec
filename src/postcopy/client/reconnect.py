"""Connects both sides of a broken postcopy again."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from postcopy.channel.address import UnixAddress, parse_socket, tcp_uri
from postcopy.client.progress import name_of, status_of
from postcopy.client.qmp import QmpConnection
from postcopy.client.status_help import status_help
from postcopy.errors import Refused
from postcopy.status import Status

_PAUSE_TIMEOUT_S: Final = 10.0
_LISTEN_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.01
_LISTENS_ALREADY: Final = "triggered already"  # in QEMU's text
_LATE_CONNECTIONS: Final = 3
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_ARRIVED: Final = (Status.POSTCOPY_PAUSED, Status.COMPLETED)
_BREAKABLE: Final = frozenset({Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER})


class Retries:
    """The times at which recovery is tried automatically.

    :param for_s: seconds after each break; 0: not at all.
    """

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self._until: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def succeeded(self) -> None:
        """Start again for the next break: pages arrive."""
        self._until, self._pause_s = None, _FIRST_PAUSE_S

    async def wait(self) -> bool:
        """Wait before another attempt, each time longer; return False when the time is over."""
        now = asyncio.get_running_loop().time()
        if self._until is None:
            self._until = now + self._for_s
        left = self._until - now
        if left <= 0:
            return False
        await asyncio.sleep(min(self._pause_s, left))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True


async def settle_if_arrived(source: QmpConnection, destination: QmpConnection) -> bool:
    """Complete a paused source whose destination has completed; return whether that is so.

    The link broke after the last page, so the source has not got the destination's answer.

    :raises Refused: the source is a QEMU, which has no such command.
    """
    if (await _status(source), await _status(destination)) != _ARRIVED:
        return False
    try:
        await source.execute("x-migrate-arrived")
    except Refused as error:
        text = "the destination has completed, and the source need not wait: end it by 'quit'"
        raise Refused(f"{text} ({error})") from error
    return True


async def bring_together(
    source: QmpConnection, destination: QmpConnection, uri: str | None = None
) -> None:
    """Make the destination listen and the source connect; returns when the source has begun.

    A side that has not noticed the break is paused.  A source whose destination has completed is only
    completed too.

    :param uri: where the destination listens; None: at a free TCP port of its host.
    :raises Refused: there is nothing to recover, or one side refuses; nothing has changed.
    :raises ChannelBroken: a monitor is gone.
    """
    if uri is not None and uri.partition(":")[0] not in {"tcp", "unix"}:
        raise Refused(f"a recovery cannot use '{uri}'; give tcp:HOST:PORT or unix:PATH")
    if await settle_if_arrived(source, destination):
        return
    await _check_broken(source, destination)
    for side in (source, destination):
        await _pause(side)
    where = uri or _free_port(destination.address)
    await _listen(destination, where)
    if "x-last-order" in await destination.execute("query-status"):  # a QEMU listens at once
        await _until_it_listens(destination)
    met = address_of(await destination.execute("query-migrate"), where)
    await source.execute("migrate", {"uri": met, "resume": True})


def address_of(info: Mapping[str, Any], asked: str) -> str:
    """Return where a destination listens: the kernel has chosen the port if 0 was requested."""
    found = next(iter(info.get("socket-address", ())), None)
    if found is None or "port" not in found or not asked.endswith(":0"):
        return asked
    host = f"[{found['host']}]" if ":" in found["host"] else found["host"]
    return f"tcp:{host}:{found['port']}"


async def _check_broken(source: QmpConnection, destination: QmpConnection) -> None:
    """Check that at least one side is paused, and the other in the same migration."""
    found = [await _status(source), await _status(destination)]
    # A source that waits for an answer to the package can be paused; its destination cannot, yet.
    breakable = (_BREAKABLE | {Status.POSTCOPY_DEVICE}, _BREAKABLE)
    if Status.POSTCOPY_PAUSED in found and all(
        status in allowed or status is Status.POSTCOPY_PAUSED
        for status, allowed in zip(found, breakable, strict=True)
    ):
        return
    sides = zip(("source", "destination"), found, (source, destination), strict=True)
    told = []
    for name, status, side in sides:
        state = (await side.execute("query-status"))["status"]
        meaning = status_help(status, state, incoming=name == "destination").meaning
        told.append(f"the {name} is {name_of(status)}: {meaning}")
    advice = ""
    if found == [Status.POSTCOPY_PAUSED, Status.FAILED]:
        advice = "; if the guest never ran there, 'cont' at the source's monitor takes it back"
    raise Refused(f"there is no broken postcopy to recover; {'; '.join(told)}{advice}")


async def _listen(destination: QmpConnection, where: str) -> None:
    """Make the destination listen again; a late connection of before is broken."""
    for _ in range(_LATE_CONNECTIONS):
        await _pause(destination)
        try:
            await destination.execute("migrate-recover", {"uri": where})
        except Refused as error:
            if _LISTENS_ALREADY in str(error):
                return
            if await _status(destination) not in _BREAKABLE:
                raise
        else:
            return
    raise Refused(f"{destination.address} gets connections again and again; try once more")


async def _until_it_listens(destination: QmpConnection) -> None:
    """Wait until the answer has an address: the command may return before it is carried out."""
    until = asyncio.get_running_loop().time() + _LISTEN_TIMEOUT_S
    while True:
        info = await destination.execute("query-migrate")
        if info.get("socket-address") or status_of(info) is not Status.POSTCOPY_PAUSED:
            return
        if asyncio.get_running_loop().time() > until:
            why = info.get("error-desc", "no reason is given")
            raise Refused(f"{destination.address} does not listen: {why}; try again")
        await asyncio.sleep(_POLL_S)


async def _pause(side: QmpConnection) -> None:
    if await _status(side) is Status.POSTCOPY_PAUSED:
        return
    try:
        await side.execute("migrate-pause")
    except Refused:
        if await _status(side) is not Status.POSTCOPY_PAUSED:
            raise  # else the link broke at the same moment
    try:
        async with asyncio.timeout(_PAUSE_TIMEOUT_S):
            while await _status(side) is not Status.POSTCOPY_PAUSED:
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        text = f"{side.address} does not pause within {_PAUSE_TIMEOUT_S:g} s; try again"
        raise Refused(text) from None


async def _status(side: QmpConnection) -> Status | str:
    return status_of(await side.execute("query-migrate"))


def _free_port(qmp: str) -> str:
    where = parse_socket(qmp, "QMP")
    return tcp_uri("127.0.0.1" if isinstance(where, UnixAddress) else where.endpoint[0], 0)
