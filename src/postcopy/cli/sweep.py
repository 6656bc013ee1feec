"""``postcopy sweep``: a store of chunks gives back what no image needs any more."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from postcopy.image.store.prune import Swept

_MIB = 1 << 20


@click.command(short_help="Free what a store of chunks holds for images that are gone.")
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
def sweep(path: Path, without: tuple[Path, ...], dry_run: bool, as_json: bool) -> None:
    """Remove every chunk that no manifest names from the store PATH, or from the store of the image PATH.

    Whoever reads an image of the store, or opens one, need not wait.  While a snapshot is being put into
    it, it is left alone.
    """
    from postcopy.image.store import prune as stores

    swept = stores.sweep(stores.store_of(path), without=without, dry_run=dry_run)
    click.echo(_as_json(swept) if as_json else _words(swept, dry_run=dry_run))


def _as_json(swept: "Swept") -> str:
    return json.dumps(
        {
            "store": str(swept.store),
            "images": [str(image) for image in swept.images],
            "kept_bytes": swept.kept_bytes,
            "freed_bytes": swept.freed_bytes,
            "idle_bytes": swept.idle_bytes,
        }
    )


def _words(swept: "Swept", *, dry_run: bool) -> str:
    freed = f"{swept.freed_bytes / _MIB:.1f} MiB {'would be ' if dry_run else ''}freed"
    idle = f", {swept.idle_bytes / _MIB:.1f} MiB idle" if swept.idle_bytes else ""
    kept = f"{swept.kept_bytes / _MIB:.1f} MiB kept for {len(swept.images)} images"
    return f"{swept.store}: {freed}, {kept}{idle}"
