"""``postcopy snapshot``: takes an image of a guest that goes on running."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from postcopy.cli.command_line import form_of_image

if TYPE_CHECKING:
    from postcopy.client.snapshot_result import Snapshot

_MIB = 1 << 20


@click.command(short_help="Take an image of a running guest, ours or QEMU's, over QMP.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--from", "source", required=True, metavar="QMP-ADDRESS", help="The machine.")
@form_of_image
@click.option(
    "--disks",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Take the disks of a QEMU's guest at the same moment; it goes on with overlays in DIR.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def snapshot(**options: Any) -> None:
    """Take an image of a guest, which goes on running, and show its figures.

    PATH is a path of this host, on which the machine must run too.  Ctrl-C cancels the snapshot; the guest
    runs on in any case.

    With --disks the guest stands still for some milliseconds.  Its disks' files then belong to the image,
    and are not written any more.
    """
    from postcopy.cli import interrupts

    interrupts.run(_snapshot(**options))


async def _snapshot(*, path: Path, source: str, as_json: bool, **options: Any) -> None:
    from postcopy.cli import progress_view
    from postcopy.cli.watch import SnapshotWatch
    from postcopy.client import Machine
    from postcopy.errors import PostcopyError

    view = progress_view.choose(as_json=as_json)
    async with Machine.connect(source) as machine:
        job = await machine.start_snapshot(path, **options)
        try:
            with view:
                taken = await SnapshotWatch(job, view, source).until_end()
        except PostcopyError as error:
            view.finish({"status": "failed", "error": str(error)})
            raise
    view.finish({"status": "completed"} | taken.to_json())
    if not as_json:
        click.echo(progress_view.as_table(list(lines(taken))))


def lines(taken: "Snapshot") -> Iterator[tuple[str, str]]:
    """The figures for a user."""
    yield "image", f"{taken.path} ({taken.format})"
    yield "pause of the guest", _ms(taken.pause_us)
    faults = "" if taken.write_faults is None else f", {taken.write_faults} writes had to wait"
    yield "longest write stall", f"{_ms(taken.longest_stall_us)}{faults}"
    yield (
        "total time",
        f"{taken.total_ms / 1000:.2f} s, of which the machine wrote for "
        f"{taken.saving_ms / 1000:.2f} s",
    )
    yield (
        "memory",
        f"{taken.ram_bytes / _MIB:.0f} MiB: {taken.data_bytes / _MIB:.1f} with data, "
        f"{taken.zero_bytes / _MIB:.1f} zero",
    )
    for disk in taken.disks:
        yield (
            f"disk {disk.name}",
            f"{disk.path}; the guest goes on with {taken.overlays[disk.name]}",
        )
    if taken.device_bytes is not None:
        yield "devices", f"{taken.device_bytes} bytes"
    yield "file", f"{taken.file_bytes / _MIB:.1f} MiB on the disk"
    if taken.new_bytes is not None and taken.stored_bytes is not None:
        yield (
            "store",
            f"{taken.new_bytes / _MIB:.1f} MiB new, which take {taken.stored_bytes / _MIB:.1f}; "
            f"{(taken.reused_bytes or 0) / _MIB:.1f} MiB reused",
        )
    yield "identity", taken.identity


def _ms(us: int | None) -> str:
    return "not measured by this machine" if us is None else f"{us / 1000:.2f} ms"
