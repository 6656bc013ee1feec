"""The commands on images: ``verify``, ``inspect``, ``diff``, ``extract`` and ``prune``."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from postcopy.cli.failures import CommandFailed

if TYPE_CHECKING:
    from postcopy.image.compare import BlockDifference, Difference
    from postcopy.image.file import Damage
    from postcopy.image.info import ImageInfo
    from postcopy.image.store.prune import PruneResult

_MIB = 1 << 20
_SHOWN_RUNS = 20


@click.command(short_help="Compare an image with its manifest, and locate damage.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--adopt", is_flag=True, help="Write a manifest for an image that has none.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def verify(path: Path, adopt: bool, as_json: bool) -> None:
    """Compare all of an image with its manifest, and the manifest with its own digest.

    Exit code 1 for a flipped bit or a missing byte; each damage is one line.
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
    if as_json:
        whole = {"path": str(path), "identity": manifest.identity, "whole": not damages}
        click.echo(json.dumps(whole | {"damages": [_damage_as_object(each) for each in damages]}))
    if damages:
        where = "one place" if len(damages) == 1 else f"{len(damages)} places"
        raise CommandFailed(f"{path} is damaged in {where}; take it from a copy")
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
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: Path, as_json: bool) -> None:
    """Show machine, memory, devices and origin of an image, ours or a real QEMU's; pages are not read."""
    from postcopy.image.formats import open_image
    from postcopy.image.info import image_info

    with open_image(path) as image:
        found = image_info(image)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    from postcopy.cli.progress_view import as_table

    click.echo(as_table(list(_inspect_rows(found))))


def _inspect_rows(found: "ImageInfo") -> Iterator[tuple[str, str]]:
    """The image for a user."""
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


@click.command(short_help="Show which pages and devices of two images differ.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with every run.")
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show which pages of 4 KiB differ between images A and B, block by block, in runs.

    The images may be of different formats.  The exit code is 0 whether they differ or not.
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


def _runs(block: "BlockDifference") -> Iterator[str]:
    yield f"block {block.name}: {block.pages} pages in {len(block.runs)} runs"
    for first, end in block.runs[:_SHOWN_RUNS]:
        yield f"  pages {first} to {end - 1} (from offset {first * 4096:#x}, {end - first} pages)"
    if len(block.runs) > _SHOWN_RUNS:
        yield f"  and {len(block.runs) - _SHOWN_RUNS} runs more; --json shows all"


@click.command(short_help="Write an image's memory to a raw file.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--ram", "out", required=True, type=click.Path(path_type=Path), metavar="OUT")
@click.option("--block", metavar="NAME", help="Which block; without it, the largest.")
def extract(path: Path, out: Path, block: str | None) -> None:
    """Write the memory of one RAM block to OUT, byte for byte; zero pages become holes.

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
        chosen = memory.choose_block(image, block)
        written = memory.extract(image, chosen, out)
    size = chosen.size_bytes / _MIB
    click.echo(f"{out}: {size:g} MiB of {chosen.name}, {written / _MIB:.1f} MiB with data")


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
