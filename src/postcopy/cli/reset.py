"""``postcopy reset``: puts a running guest back to an earlier point."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from postcopy.client import Reset, ResetPoint


@click.command(short_help="Put a running guest back to an earlier point.")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--from", "source", required=True, metavar="QMP-ADDRESS", help="The machine.")
@click.option("--point", is_flag=True, help="Only set the point: this moment, or PATH.")
@click.option("--end", is_flag=True, help="Remove the point; the guest runs on as it is.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def reset(path: Path | None, source: str, *, point: bool, end: bool, as_json: bool) -> None:
    """Put a running guest back to its point: memory, devices and time.

    The point is the image PATH, or else the one that was set before.  The time depends on how much the
    guest has written since, and not on its memory size; but the first reset to an image puts back all
    memory.

    While there is a point, migrations and snapshots of the guest are refused.
    """
    from postcopy.cli import interrupts

    if end and (point or path is not None):
        raise click.UsageError("--end excludes --point and a path")
    done = interrupts.run(_reset(path, source, point=point, end=end))
    click.echo(json.dumps(as_object(done)) if as_json else words(done))


async def _reset(
    path: Path | None, source: str, *, point: bool, end: bool
) -> "Reset | ResetPoint | None":
    from postcopy.client import Machine

    async with Machine.connect(source) as machine:
        if end:
            await machine.reset_end()
            return None
        if point:
            return await machine.reset_point(path)
        if path is not None:
            await machine.reset_point(path)
        return await machine.reset()


def as_object(done: "Reset | ResetPoint | None") -> dict[str, Any]:
    """The result for programs."""
    from dataclasses import asdict

    from postcopy.client import Reset

    if done is None:
        return {"event": "ended"}
    if isinstance(done, Reset):
        return {"event": "reset"} | asdict(done)
    return {"event": "point", "pause_us": done.pause_us, "copied_bytes": done.copied_bytes}


def words(done: "Reset | ResetPoint | None") -> str:
    """The result for a user."""
    from postcopy.client import Reset

    if done is None:
        return "the reset point is removed; the guest runs on"
    if isinstance(done, Reset):
        why = ", all memory compared" if done.whole else ""
        return f"back at the point: {done.pages} pages in {done.us / 1000:.2f} ms{why}"
    return (
        f"the reset point is set: {done.copied_bytes / (1 << 20):.1f} MiB copied, the guest was stopped "
        f"for {done.pause_us / 1000:.2f} ms"
    )
