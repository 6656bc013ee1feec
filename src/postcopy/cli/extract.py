"""``postcopy extract``: the memory of an image as a plain file."""

from pathlib import Path

import click

_MIB = 1 << 20


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
