"""``postcopy prune``: remove from a store the chunks that no image needs any more."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from postcopy.image.store.prune import PruneResult

_MIB = 1 << 20


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
    click.echo(_as_json(pruned) if as_json else _words(pruned, dry_run=dry_run))


def _as_json(pruned: "PruneResult") -> str:
    return json.dumps(
        {
            "store": str(pruned.store),
            "images": [str(image) for image in pruned.images],
            "kept_bytes": pruned.kept_bytes,
            "freed_bytes": pruned.freed_bytes,
            "idle_bytes": pruned.idle_bytes,
        }
    )


def _words(pruned: "PruneResult", *, dry_run: bool) -> str:
    freed = f"{pruned.freed_bytes / _MIB:.1f} MiB {'would be ' if dry_run else ''}freed"
    idle = f", {pruned.idle_bytes / _MIB:.1f} MiB idle" if pruned.idle_bytes else ""
    kept = f"{pruned.kept_bytes / _MIB:.1f} MiB kept for {len(pruned.images)} images"
    return f"{pruned.store}: {freed}, {kept}{idle}"
