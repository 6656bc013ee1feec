"""The command ``postcopy convert``."""

import json
from pathlib import Path

import click

_MIB = 1 << 20
_FORMS = ("mapped-ram", "stream", "chunks")


@click.command(short_help="Write an image anew in another format.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMS),
    default=_FORMS[0],
    show_default=True,
    help="Pages at fixed offsets; a plain stream; or compressed in a store beside the image.",
)
@click.option(
    "--parent",
    type=click.Path(path_type=Path),
    metavar="IMAGE",
    help="An image whose store of chunks is shared: only other memory takes space.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def convert(source: Path, path: Path, form: str, parent: Path | None, as_json: bool) -> None:
    """Write the image SOURCE anew as PATH, with a manifest; a QEMU loads the first two formats.

    SOURCE is an image of ours, a file that QEMU has saved, or one of "virsh save", also a compressed one.
    An image with a manifest is verified first. The state of the devices stays as it is, byte for byte.
    """
    from postcopy.image.finalize import check_parent
    from postcopy.image.finalize import convert as write_anew
    from postcopy.image.manifest import Manifest, beside
    from postcopy.image.options import Form, ImageOptions
    from postcopy.image.verify import find_damages

    if parent is not None and form != "chunks":
        raise click.UsageError("--parent needs --format chunks")
    if parent is not None:
        check_parent(parent)
    command = None
    if beside(source).exists():
        manifest = Manifest.load(source)
        command = manifest.command
        for damage in find_damages(source, manifest):
            raise damage.error()
    plain: Form = "stream" if form == "stream" else "mapped-ram"
    options = ImageOptions(plain, form == "chunks", parent, command)
    made = write_anew(source, path, options)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "path": str(path),
                    "format": made.manifest.form,
                    "identity": made.manifest.identity,
                    "ram_bytes": made.ram_bytes,
                    "file_bytes": made.file_bytes,
                }
            )
        )
        return
    size = made.ram_bytes / _MIB
    disk = f"{made.file_bytes / _MIB:.1f} MiB on the disk"
    click.echo(f"{path}: {form}, {size:g} MiB of memory, {disk}; identity {made.manifest.identity}")
