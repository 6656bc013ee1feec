"""Both sides of a postcopy that broke are brought together again."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from postcopy.channel.address import UnixAddress, parse_socket, tcp_uri
from postcopy.client.connection import Connection
from postcopy.client.standing import standing
from postcopy.client.told import name_of, status_of
from postcopy.errors import Refused
from postcopy.status import Status

_PAUSE_TIMEOUT_S: Final = 10.0
_LISTEN_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.01
_LISTENS_ALREADY: Final = "triggered already"  # QEMU's words
_LATE_CONNECTIONS: Final = 3
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_ARRIVED: Final = (Status.POSTCOPY_PAUSED, Status.COMPLETED)
_BREAKABLE: Final = frozenset({Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER})


class Retries:
    """How often and how long recovery is tried unasked.

    :param for_s: seconds after each break; 0: not at all.
    """

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self._until: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def succeeded(self) -> None:
        """Pages flow: the next break has all its time before it."""
        self._until, self._pause_s = None, _FIRST_PAUSE_S

    async def wait(self) -> bool:
        """Wait before another attempt, each time longer; return whether there is one to make."""
        now = asyncio.get_running_loop().time()
        if self._until is None:
            self._until = now + self._for_s
        left = self._until - now
        if left <= 0:
            return False
        await asyncio.sleep(min(self._pause_s, left))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True


async def settle_if_arrived(source: Connection, destination: Connection) -> bool:
    """Tell a paused source that its destination has completed, if it has; return whether so.

    The link broke when the last page had come, so the destination could not say it itself.

    :raises Refused: the source is a QEMU, which cannot be told.
    """
    if (await _status(source), await _status(destination)) != _ARRIVED:
        return False
    try:
        await source.execute("x-migrate-arrived")
    except Refused as error:
        text = (
            "the destination has completed, whole, and the source need not wait: end it by 'quit'"
        )
        raise Refused(f"{text} ({error})") from error
    return True


async def bring_together(
    source: Connection, destination: Connection, uri: str | None = None
) -> None:
    """Have the destination listen and the source go on; returns when the source has begun to.

    A side that has not noticed the break yet is told to.  Where only the source does not know that
    all is well, it is told so, and that is all.

    :param uri: where to meet; None: at a free TCP port of the destination's host.
    :raises Refused: nothing is to be recovered here, or one side refuses; nothing has changed.
    :raises ChannelBroken: a monitor is gone.
    """
    if uri is not None and uri.partition(":")[0] not in {"tcp", "unix"}:
        raise Refused(f"cannot meet at '{uri}'; give tcp:HOST:PORT or unix:PATH")
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
    """Where a destination listens: the port is the kernel's choice if 0 was asked for."""
    found = next(iter(info.get("socket-address", ())), None)
    if found is None or "port" not in found or not asked.endswith(":0"):
        return asked
    host = f"[{found['host']}]" if ":" in found["host"] else found["host"]
    return f"tcp:{host}:{found['port']}"


async def _check_broken(source: Connection, destination: Connection) -> None:
    """At least one side must be paused, and the other be in the same migration."""
    found = [await _status(source), await _status(destination)]
    # A source that has sent the package and hears nothing can be paused; its destination cannot, yet.
    breakable = (_BREAKABLE | {Status.POSTCOPY_DEVICE}, _BREAKABLE)
    if Status.POSTCOPY_PAUSED in found and all(
        status in allowed or status is Status.POSTCOPY_PAUSED
        for status, allowed in zip(found, breakable, strict=True)
    ):
        return
    whose = zip(("source", "destination"), found, (source, destination), strict=True)
    told = []
    for name, status, side in whose:
        state = (await side.execute("query-status"))["status"]
        meaning = standing(status, state, incoming=name == "destination").meaning
        told.append(f"the {name} is {name_of(status)}: {meaning}")
    advice = ""
    if found == [Status.POSTCOPY_PAUSED, Status.FAILED]:
        advice = "; if the guest never ran there, 'cont' at the source's monitor takes it back"
    raise Refused(f"there is no broken postcopy to recover; {'; '.join(told)}{advice}")


async def _listen(destination: Connection, where: str) -> None:
    """Have it listen anew; a connection from before may come as late as that, and is broken then."""
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
    raise Refused(f"{destination.address} is called again and again; try once more")


async def _until_it_listens(destination: Connection) -> None:
    """Its order may have been answered before it was carried out: then it says no address."""
    until = asyncio.get_running_loop().time() + _LISTEN_TIMEOUT_S
    while True:
        info = await destination.execute("query-migrate")
        if info.get("socket-address") or status_of(info) is not Status.POSTCOPY_PAUSED:
            return
        if asyncio.get_running_loop().time() > until:
            why = info.get("error-desc", "no reason is given")
            raise Refused(f"{destination.address} does not listen: {why}; try again")
        await asyncio.sleep(_POLL_S)


async def _pause(side: Connection) -> None:
    if await _status(side) is Status.POSTCOPY_PAUSED:
        return
    try:
        await side.execute("migrate-pause")
    except Refused:
        if await _status(side) is not Status.POSTCOPY_PAUSED:
            raise  # else it has broken by itself, in that very moment
    try:
        async with asyncio.timeout(_PAUSE_TIMEOUT_S):
            while await _status(side) is not Status.POSTCOPY_PAUSED:
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        text = f"{side.address} does not pause within {_PAUSE_TIMEOUT_S:g} s; try again"
        raise Refused(text) from None


async def _status(side: Connection) -> Status | str:
    return status_of(await side.execute("query-migrate"))


def _free_port(qmp: str) -> str:
    where = parse_socket(qmp, "QMP")
    return tcp_uri("127.0.0.1" if isinstance(where, UnixAddress) else where.endpoint[0], 0)
