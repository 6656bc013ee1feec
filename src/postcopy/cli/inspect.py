"""``postcopy inspect``: what is in an image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from postcopy.image.info import ImageInfo

_MIB = 1 << 20


@click.command(short_help="Show what is in an image: machine, memory, devices, origin.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what is in an image, ours or a real QEMU's, without reading its pages."""
    from postcopy.image.formats import open_image
    from postcopy.image.info import image_info

    with open_image(path) as image:
        found = image_info(image)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    from postcopy.cli import report

    click.echo(report.text(list(lines(found))))


def lines(found: "ImageInfo") -> Iterator[tuple[str, str]]:
    """What there is to say, for a person."""
    yield "image", found.path
    yield "format", found.format
    yield "machine", found.machine if found.uuid is None else f"{found.machine}, {found.uuid}"
    disk = f"{found.disk_bytes / _MIB:.1f} MiB on the disk"
    yield "file", f"{found.file_bytes / _MIB:.1f} MiB, {disk}"
    if found.store is not None:
        yield "chunks", f"{found.stored_chunks} in {found.store}"
    for block in found.blocks:
        yield (
            f"block {block.name}",
            f"{block.size_bytes / _MIB:g} MiB: {block.data_pages} pages with data, "
            f"{block.zero_pages} zero",
        )
    for device in found.devices:
        name = f"device {device.name} {device.instance}"
        yield name, f"version {device.version}, {device.size_bytes} bytes"
    if found.working_set is not None:
        yield "working set", found.working_set
    if found.manifest is None:
        yield "manifest", "none: a bit that has changed cannot be detected"
        return
    yield from _told(found)


def _told(found: "ImageInfo") -> Iterator[tuple[str, str]]:
    assert found.manifest is not None
    times = found.manifest["times"]
    yield "identity", found.manifest["identity"]
    yield "taken", times["created"]
    for name, key, unit, factor in (
        ("pause", "pause_us", "ms", 1000),
        ("longest write stall", "longest_stall_us", "ms", 1000),
        ("total time", "total_ms", "s", 1000),
    ):
        if times[key] is not None:
            yield name, f"{times[key] / factor:.2f} {unit}"
    parent = found.manifest["parent"]
    if parent is not None:
        yield "parent", f"{parent['path']} ({parent['identity'][:16]})"
