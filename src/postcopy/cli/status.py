"""``postcopy status``: in plain words, where a migration stands and what to type next."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from postcopy.client.standing import Standing

_MIB = 1 << 20
_UNKNOWN = "QMP-ADDRESS"
_ARRIVED = "x_migrate_arrived   (at the source's monitor: the destination has every page)"
_TAKE_BACK = "cont   (at the source's monitor: the destination never ran the guest)"


@dataclass(frozen=True, slots=True)
class Side:
    """What one side says of itself, and what that means."""

    name: str
    address: str
    status: str
    run_state: str
    why: str | None
    remaining_bytes: int | None
    standing: "Standing"


@click.command(short_help="Where a migration stands, and what to type next.")
@click.option("--from", "source", metavar="QMP-ADDRESS", help="The side that the guest leaves.")
@click.option("--to", "destination", metavar="QMP-ADDRESS", help="The side that it goes to.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(source: str | None, destination: str | None, *, as_json: bool) -> None:
    """Tell where a migration stands, who owns the guest, what is waited for and what to type next."""
    from postcopy.cli import drive

    if source is None and destination is None:
        raise click.UsageError("give --from or --to, or both")
    sides = drive.run(_ask(source, destination))
    following = what_next(sides, source, destination)
    if as_json:
        click.echo(json.dumps(as_object(sides, following)))
        return
    for side in sides:
        click.echo("\n".join(lines(side)))
    click.echo(f"next         {following or 'nothing to do'}")


async def _ask(source: str | None, destination: str | None) -> list[Side]:
    from postcopy.client import Machine

    sides = []
    for name, address in (("source", source), ("destination", destination)):
        if address is not None:
            async with await Machine.connect(address) as machine:
                info, run_state = await machine.migration_info(), await machine.run_state()
            sides.append(side_of(name, address, info, run_state))
    return sides


def side_of(name: str, address: str, info: Mapping[str, Any], run_state: str) -> Side:
    """Put one side's answers into words."""
    from postcopy.client.standing import is_restoring, standing
    from postcopy.client.told import name_of, status_of

    found = status_of(info)
    return Side(
        name=name,
        address=address,
        status=name_of(found),
        run_state=run_state,
        why=info.get("error-desc"),
        remaining_bytes=info.get("ram", {}).get("remaining"),
        standing=standing(
            found, run_state, incoming=name == "destination", restoring=is_restoring(info)
        ),
    )


def what_next(sides: list[Side], source: str | None, destination: str | None) -> str:
    """What to type next: the source's row comes first, if it has something to say."""
    found = {side.name: (side.status, side.run_state) for side in sides}
    if found.get("source", ("", ""))[0] == "postcopy-paused":
        there = found.get("destination", ("", ""))
        if there == ("failed", "inmigrate"):
            return _TAKE_BACK
        if there[0] == "completed":
            return _ARRIVED
    said = (side.standing.next for side in sides if side.standing.next)
    return next(said, "").format(source=source or _UNKNOWN, destination=destination or _UNKNOWN)


def lines(side: Side) -> Iterator[str]:
    """One side, for a person."""
    yield f"{side.name:<12} {side.standing.meaning}"
    left = "" if not side.remaining_bytes else f", {side.remaining_bytes / _MIB:.1f} MiB remaining"
    yield f"  status     {side.status}; the machine is {side.run_state}{left}"
    if side.why:
        yield f"  because    {side.why}"
    yield f"  the guest  is {side.standing.owner}"
    if side.standing.waits_for:
        yield f"  waits for  {side.standing.waits_for}"


def as_object(sides: list[Side], following: str) -> dict[str, Any]:
    """The same for programs."""
    return {side.name: asdict(side) for side in sides} | {"next": following}
