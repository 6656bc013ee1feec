"""``postcopy verify``: whether an image is still what it was."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from postcopy.cli.failures import CommandFailed

if TYPE_CHECKING:
    from postcopy.image.file import Damage


@click.command(short_help="Tell whether an image is still what it was, and where not.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--adopt", is_flag=True, help="Write a manifest for an image that has none.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def verify(path: Path, adopt: bool, as_json: bool) -> None:
    """Compare all of an image with its manifest, and the manifest with itself.

    Exit code 1 if a bit is wrong, or a byte missing; each damage is one line.
    """
    from postcopy.errors import Refused
    from postcopy.image.file import ImageFile
    from postcopy.image.manifest import Manifest, beside
    from postcopy.image.verify import find_damages

    ImageFile(path).close()  # whether it is there at all
    if adopt:
        _adopt(path)
    elif not beside(path).exists():
        raise Refused(
            f"{path} has no manifest, and nothing can be said of it; "
            f"if you trust it now, type 'postcopy verify --adopt {path}'"
        )
    manifest = Manifest.load(path)
    damages = []
    for damage in find_damages(path, manifest):
        damages.append(damage)
        if not as_json:
            click.echo(str(damage.error()))
    if as_json:
        whole = {"path": str(path), "identity": manifest.identity, "whole": not damages}
        click.echo(json.dumps(whole | {"damages": [_as_object(each) for each in damages]}))
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


def _as_object(damage: "Damage") -> dict[str, Any]:
    return {
        "file": str(damage.path),
        "offset": damage.offset,
        "length_bytes": damage.length_bytes,
        "block": damage.block,
        "block_offset": damage.block_offset,
    }
