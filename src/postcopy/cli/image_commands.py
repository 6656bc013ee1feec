"""The commands on images: ``verify``, ``inspect``, ``diff``, ``extract`` and ``prune``."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from postcopy.cli.failures import CommandFailed

if TYPE_CHECKING:
    from postcopy.image.compare import BlockDifference, Difference, FieldDifference
    from postcopy.image.file import Damage
    from postcopy.image.formats import Image
    from postcopy.image.info import ImageInfo
    from postcopy.image.store.prune import PruneResult

_MIB = 1 << 20
_SHOWN_RUNS = 20
_SHOWN_FIELDS = 100
_SHOWN_CHARACTERS = 40


@click.command(short_help="Compare an image with its manifest, and locate damage.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--adopt", is_flag=True, help="Write a manifest for an image that has none.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def verify(path: Path, adopt: bool, as_json: bool) -> None:
    """Compare all of an image with its manifest, and the manifest with its own digest.

    Exit code 1 for a flipped bit or a missing byte; each damage is one line.  Disks that were taken with
    the image are compared by size and time.
    """
    from postcopy.errors import Refused
    from postcopy.image.file import ImageFile
    from postcopy.image.manifest import Manifest, beside
    from postcopy.image.verify import find_damages

    ImageFile(path).close()  # raises if there is no image
    if adopt:
        _adopt(path)
    elif not beside(path).exists():
        raise Refused(
            f"{path} has no manifest to compare with; "
            f"if you trust the image, type 'postcopy verify --adopt {path}'"
        )
    manifest = Manifest.load(path)
    damages = []
    for damage in find_damages(path, manifest):
        damages.append(damage)
        if not as_json:
            click.echo(str(damage.error()))
    changed = [text for disk in manifest.disks if (text := disk.damage()) is not None]
    if as_json:
        whole = not damages and not changed
        told = {"path": str(path), "identity": manifest.identity, "whole": whole, "disks": changed}
        click.echo(json.dumps(told | {"damages": [_damage_as_object(each) for each in damages]}))
    else:
        for text in changed:
            click.echo(text)
    if damages:
        where = "one place" if len(damages) == 1 else f"{len(damages)} places"
        raise CommandFailed(f"{path} is damaged in {where}; take it from a copy")
    if changed:
        raise CommandFailed(f"{path} is whole, and its disks are not; take them from a copy")
    if not as_json:
        click.echo(f"{path}: whole; identity {manifest.identity}")


def _adopt(path: Path) -> None:
    from postcopy.channel.whole_file import check_replaceable
    from postcopy.errors import Refused
    from postcopy.image.finalize import make_manifest, utc_now
    from postcopy.image.formats import open_image
    from postcopy.image.manifest import Times, beside

    if beside(path).exists():
        raise Refused(f"{beside(path)} exists; leave --adopt out, or remove it")
    check_replaceable(beside(path))
    with open_image(path) as image:
        make_manifest(image, Times(utc_now())).save(path, replacing=False)


def _damage_as_object(damage: "Damage") -> dict[str, Any]:
    return {
        "file": str(damage.path),
        "offset": damage.offset,
        "length_bytes": damage.length_bytes,
        "block": damage.block,
        "block_offset": damage.block_offset,
    }


@click.command(short_help="Show machine, memory, devices and origin of an image.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--records", is_flag=True, help="Show the file record by record.")
@click.option("--fields", is_flag=True, help="Show the state of the devices, field by field.")
@click.option("--json", "as_json", is_flag=True, help="JSON: one object; of records, one a line.")
def inspect(path: Path, records: bool, fields: bool, as_json: bool) -> None:
    """Show machine, memory, devices and origin of an image.

    PATH is an image of ours, a file that QEMU has saved, or one of "virsh save".
    """
    from postcopy.image.formats import open_image
    from postcopy.image.info import image_info

    if records and fields:
        raise click.UsageError("--records --json has the fields, too; leave --fields out")
    if records:
        _show_records(path, as_json=as_json)
        return
    with open_image(path) as image:
        if fields:
            _show_fields(image, as_json=as_json)
            return
        found = image_info(image)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    from postcopy.cli.progress_view import as_table

    click.echo(as_table(list(_inspect_rows(found))))
    if found.libvirt is not None:
        click.echo(found.libvirt["xml"])


def _show_records(path: Path, *, as_json: bool) -> None:
    from postcopy.image.records import ImageRecord, read_records

    def as_line(record: ImageRecord) -> str:
        if as_json:
            return json.dumps({"offset": record.offset, "kind": record.kind} | record.values)
        values = [f"{k}={v}" for k, v in record.values.items() if k not in {"fields", "xml"}]
        return f"{record.offset:#012x} {record.kind:13} {' '.join(values)}".rstrip()

    read_records(path, lambda record: click.echo(as_line(record)))


def _show_fields(image: "Image", *, as_json: bool) -> None:
    from postcopy.image.device_fields import device_fields
    from postcopy.stream.described_state import flatten

    devices = list(device_fields(image))
    if as_json:
        shown = [
            {
                "name": each.section.name,
                "instance": each.section.instance,
                "version": each.section.version,
                "fields": each.fields,
            }
            for each in devices
        ]
        click.echo(json.dumps({"devices": shown}))
        return
    for device in devices:
        for path, value in flatten(device.fields):
            click.echo(f"{device.name}: {path} = {value}")


def _inspect_rows(found: "ImageInfo") -> Iterator[tuple[str, str]]:
    """The image for a user."""
    yield "image", found.path
    yield "format", found.format
    if found.libvirt is not None:
        running = "running" if found.libvirt["was_running"] else "paused"
        yield "libvirt", f"format {found.libvirt['stream_format']}, the domain was {running}"
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
        yield name, f"version {device.version}, {device.size_bytes} bytes{_what(device.name)}"
    if found.working_set is not None:
        yield "working set", found.working_set
    if found.manifest is None:
        yield "manifest", "none: a bit that has changed cannot be detected"
        return
    yield from _manifest_rows(found)


def _what(device: str) -> str:
    if device.startswith("virtio-mmio@") and device.endswith("-blk"):
        return ": a drive's registers; what is on the disk is not in the image"
    return ""


def _manifest_rows(found: "ImageInfo") -> Iterator[tuple[str, str]]:
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
    if found.manifest["command"] is not None:
        yield "command", found.manifest["command"]
    parent = found.manifest["parent"]
    if parent is not None:
        yield "parent", f"{parent['path']} ({parent['identity'][:16]})"
    for disk in found.manifest["disks"]:
        size = f"{disk['format']}, {disk['size_bytes'] / _MIB:g} MiB"
        yield f"disk {disk['name']}", f"{disk['path']} ({size})"


@click.command(short_help="Show which pages, devices and fields of two images differ.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with every run.")
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show which pages of 4 KiB differ between images A and B, block by block, in runs.

    Of devices that differ, it shows the fields. The images may be of different formats.  The exit code is 0
    whether they differ or not.
    """
    from postcopy.image.compare import compare
    from postcopy.image.formats import open_image

    with open_image(a) as image_a, open_image(b) as image_b:
        found = compare(image_a, image_b)
    if as_json:
        totals = {"equal": found.equal, "pages": found.pages}
        click.echo(json.dumps(totals | asdict(found)))
        return
    for line in _differences(found):
        click.echo(line)


def _differences(found: "Difference") -> Iterator[str]:
    """The differences for a user."""
    if found.equal:
        yield "the images are equal"
        return
    if found.machines[0] != found.machines[1]:
        yield f"machine: {found.machines[0]} and {found.machines[1]}"
    for block in found.blocks:
        if block.only_in is not None:
            yield f"block {block.name}: only in {block.only_in.upper()}, or of another size"
        elif block.pages:
            yield from _runs(block)
    if found.devices:
        yield f"devices: {', '.join(found.devices)}"
    for field in found.fields[:_SHOWN_FIELDS]:
        yield _field(field)
    if len(found.fields) > _SHOWN_FIELDS:
        yield f"  and {len(found.fields) - _SHOWN_FIELDS} fields more; --json shows all"


def _field(field: "FieldDifference") -> str:
    a, b = (str(value) for value in (field.a, field.b))
    where = f"  {field.device}: {field.field}"
    if len(a) != len(b) or len(a) <= _SHOWN_CHARACTERS:
        return f"{where}: {a[:_SHOWN_CHARACTERS]} and {b[:_SHOWN_CHARACTERS]}"
    at = next(at for at in range(0, len(a), 2) if a[at : at + 2] != b[at : at + 2])
    return f"{where}: byte {at // 2:#x}: {a[at : at + 2]} and {b[at : at + 2]}"


def _runs(block: "BlockDifference") -> Iterator[str]:
    yield f"block {block.name}: {block.pages} pages in {len(block.runs)} runs"
    for first, end in block.runs[:_SHOWN_RUNS]:
        yield f"  pages {first} to {end - 1} (from offset {first * 4096:#x}, {end - first} pages)"
    if len(block.runs) > _SHOWN_RUNS:
        yield f"  and {len(block.runs) - _SHOWN_RUNS} runs more; --json shows all"


@click.command(short_help="Write an image's memory to a raw file.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--ram",
    "out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="The file to write.",
)
@click.option("--block", metavar="NAME", help="One RAM block; without it, the physical memory.")
def extract(path: Path, out: Path, block: str | None) -> None:
    """Write the physical memory to OUT, each byte at its address, or one RAM block; zeros become holes.

    A PC with much memory has a part of it from 4 GiB on, and a hole in front of that. Memory of devices,
    such as a frame buffer, is not written. Of a machine that is no PC or microvm, the largest block is
    written.

    An image with a manifest is verified first.
    """
    from postcopy.image import extract as memory
    from postcopy.image.formats import open_image
    from postcopy.image.manifest import Manifest, beside
    from postcopy.image.verify import find_damages

    if beside(path).exists():
        for damage in find_damages(path, Manifest.load(path)):
            raise damage.error()
    with open_image(path) as image:
        ranges = memory.choose_ranges(image, block)
        written = memory.extract(image, ranges, out)
    size = sum(each.length_bytes for each in ranges) / _MIB
    names = ", ".join(dict.fromkeys(each.block.name for each in ranges))
    click.echo(f"{out}: {size:g} MiB of {names}, {written / _MIB:.1f} MiB with data")


@click.command(short_help="Remove the chunks of images that are gone from a store.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--without",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FOLDER",
    help="A folder whose images are gone for good.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def prune(path: Path, without: tuple[Path, ...], dry_run: bool, as_json: bool) -> None:
    """Remove every chunk that no manifest names from the store PATH, or from the store of the image PATH.

    Images of the store can be read and opened meanwhile.  The command is refused while a snapshot writes
    into the store.
    """
    from postcopy.image.store import prune as stores

    pruned = stores.prune(stores.find_store(path), without=without, dry_run=dry_run)
    click.echo(_pruned_as_json(pruned) if as_json else _pruned_text(pruned, dry_run=dry_run))


def _pruned_as_json(pruned: "PruneResult") -> str:
    return json.dumps(
        {
            "store": str(pruned.store),
            "images": [str(image) for image in pruned.images],
            "kept_bytes": pruned.kept_bytes,
            "freed_bytes": pruned.freed_bytes,
            "idle_bytes": pruned.idle_bytes,
        }
    )


def _pruned_text(pruned: "PruneResult", *, dry_run: bool) -> str:
    freed = f"{pruned.freed_bytes / _MIB:.1f} MiB {'would be ' if dry_run else ''}freed"
    idle = f", {pruned.idle_bytes / _MIB:.1f} MiB idle" if pruned.idle_bytes else ""
    kept = f"{pruned.kept_bytes / _MIB:.1f} MiB kept for {len(pruned.images)} images"
    return f"{pruned.store}: {freed}, {kept}{idle}"
