"""``postcopy status``: the state of a migration, and the command to type next."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from postcopy.errors import CannotConnect, ChannelBroken

if TYPE_CHECKING:
    from postcopy.client.status_help import StatusHelp

_MIB = 1 << 20
_UNKNOWN = "QMP-ADDRESS"
_UNREACHABLE = "unreachable"
_NEEDS_THE_OTHER = frozenset({"postcopy-active", "postcopy-paused", "postcopy-recover"})
_IS_IT_ALIVE = (
    "check whether the process at {destination} has ended: then the guest is lost, and has to be started "
    "again; else recover it when it can be reached, and do not end the source"
)
_ARRIVED = "x_migrate_arrived   (at the source's monitor: the destination has every page)"
_TAKE_BACK = "cont   (at the source's monitor: the destination never ran the guest)"


@dataclass(frozen=True, slots=True)
class Side:
    """The answers of one side, and their meaning."""

    name: str
    address: str
    status: str
    run_state: str
    why: str | None
    remaining_bytes: int | None
    standing: "StatusHelp"
    last_order: str | None = None
    tells_owner: bool = True
    put_back: tuple[str, ...] = ()


@click.command(short_help="Show the state of a migration, and what to type next.")
@click.option("--from", "source", metavar="QMP-ADDRESS", help="The source.")
@click.option("--to", "destination", metavar="QMP-ADDRESS", help="The destination.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(source: str | None, destination: str | None, *, as_json: bool) -> None:
    """Show the state of a migration, the owner of the guest, and what to type next.

    What a killed 'postcopy snapshot --disks' has left at a QEMU is put back first.
    """
    from postcopy.cli import interrupts

    if source is None and destination is None:
        raise click.UsageError("give --from or --to, or both")
    sides = interrupts.run(_ask(source, destination))
    following = what_next(sides, source, destination)
    if as_json:
        click.echo(json.dumps(as_object(sides, following)))
        _fail_if_unreachable(sides)
        return
    for side in sides:
        click.echo("\n".join(lines(side)))
    click.echo(f"next         {following or 'nothing to do'}")
    _fail_if_unreachable(sides)


def _fail_if_unreachable(sides: list[Side]) -> None:
    gone = [side.why for side in sides if side.status == _UNREACHABLE and side.why]
    if gone:
        raise CannotConnect("; ".join(gone))


async def _ask(source: str | None, destination: str | None) -> list[Side]:
    from postcopy.client import Machine

    sides = []
    for name, address in (("source", source), ("destination", destination)):
        if address is not None:
            try:
                async with await Machine.connect(address) as machine:
                    put_back = tuple(await machine.put_back_snapshot())
                    state, info = (
                        await machine.execute("query-status"),
                        await machine.migration_info(),
                    )
            except (CannotConnect, ChannelBroken) as error:
                sides.append(unreachable(name, address, str(error)))
            else:
                sides.append(replace(side_of(name, address, info, state), put_back=put_back))
    return sides


def unreachable(name: str, address: str, why: str) -> Side:
    """Make a side that does not answer; the other side is shown all the same."""
    from postcopy.client.status_help import UNREACHABLE

    return Side(name, address, _UNREACHABLE, _UNREACHABLE, why, None, UNREACHABLE)


def side_of(name: str, address: str, info: Mapping[str, Any], state: Mapping[str, Any]) -> Side:
    """Explain the answers of one side.

    :param state: the answer to ``query-status``, which tells the side.
    """
    from postcopy.client.explain import explain, last_order
    from postcopy.client.progress import name_of, status_of

    found = status_of(info)
    return Side(
        name=name,
        address=address,
        status=name_of(found),
        run_state=str(state["status"]),
        why=info.get("error-desc"),
        remaining_bytes=info.get("ram", {}).get("remaining"),
        standing=explain(state, info),
        last_order=last_order(state),
        tells_owner="x-owner" in state,
    )


def what_next(sides: list[Side], source: str | None, destination: str | None) -> str:
    """Return the command to type next: the source's, if it has one."""
    found = {side.name: (side.status, side.run_state) for side in sides}
    there = found.get("destination", ("", ""))
    if found.get("source", ("", ""))[0] in _NEEDS_THE_OTHER and there[0] == _UNREACHABLE:
        return _IS_IT_ALIVE.format(destination=destination)
    if found.get("source", ("", ""))[0] == "postcopy-paused":
        if there == ("failed", "inmigrate"):
            return _TAKE_BACK
        if there[0] == "completed":
            return _ARRIVED
    said = (side.standing.next for side in sides if side.standing.next)
    return next(said, "").format(source=source or _UNKNOWN, destination=destination or _UNKNOWN)


def lines(side: Side) -> Iterator[str]:
    """One side for a user."""
    yield f"{side.name:<12} {side.standing.meaning}"
    left = "" if not side.remaining_bytes else f", {side.remaining_bytes / _MIB:.1f} MiB remaining"
    yield f"  status     {side.status}; the machine is {side.run_state}{left}"
    for note in side.put_back:
        yield f"  note       {note}"
    if side.why:
        yield f"  because    {side.why}"
    if side.last_order:
        yield f"  last order {side.last_order}"
    yield f"  the guest  is {side.standing.owner}"
    if not side.tells_owner:
        yield "             (derived from the run state: a QEMU does not tell the owner)"
    if side.standing.waits_for:
        yield f"  waits for  {side.standing.waits_for}"


def as_object(sides: list[Side], following: str) -> dict[str, Any]:
    """All sides for programs."""
    return {side.name: asdict(side) for side in sides} | {"next": following}
