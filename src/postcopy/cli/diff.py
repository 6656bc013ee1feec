"""``postcopy diff``: where two images differ."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from postcopy.image.compare import BlockDifference, Difference

_SHOWN_RUNS = 20


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
    for line in lines(found):
        click.echo(line)


def lines(found: "Difference") -> Iterator[str]:
    """What differs, for a person."""
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
