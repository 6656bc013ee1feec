"""``postcopy serve``: an image is a postcopy source for a machine that waits with ``-incoming``."""

from pathlib import Path
from typing import Any

import click

from postcopy.cli.command_line import TLS, TLS_HOSTNAME, Size


@click.command(short_help="Wake a saved guest in a waiting QEMU before its memory is there.")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("uri")
@click.option("--resume", is_flag=True, help="Go on with a destination that has lost its server.")
@click.option("--preempt", is_flag=True, help="It has the capability postcopy-preempt.")
@click.option("--bandwidth", type=Size("M"), metavar="SIZE", help="Limit a second of the push.")
@click.option(
    "--page-size",
    "page_sizes",
    multiple=True,
    metavar="BLOCK=SIZE",
    help="A RAM block that has huge pages there.",
)
@TLS
@TLS_HOSTNAME
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def serve(**options: Any) -> None:
    """Serve the image PATH to the machine that waits at URI, such as tcp:HOST:PORT or unix:PATH.

    The machine has the capability postcopy-ram; its guest runs at once, and its pages are sent as it needs
    them, all others in the background.  The command ends when it has every page.  A machine that loses the
    server waits (postcopy-paused): give it 'migrate-recover URI', and serve again with --resume.  Exit code
    4: so it is, and nothing is lost.
    """
    from postcopy.cli import interrupts

    interrupts.run(_serve(**options))


async def _serve(
    *,
    path: Path,
    uri: str,
    resume: bool,
    preempt: bool,
    bandwidth: int | None,
    page_sizes: tuple[str, ...],
    tls: str | None,
    tls_hostname: str | None,
    as_json: bool,
) -> None:
    import asyncio
    import contextlib

    from postcopy.cli import interrupts
    from postcopy.cli.tls import options_of
    from postcopy.lazy_restore.restore_image import RestoreImage
    from postcopy.serve.server import ImageServer, ServeOptions

    options = ServeOptions(
        preempt=preempt,
        bandwidth=bandwidth or 0,
        page_sizes=dict(map(_page_size, page_sizes)),
        tls=options_of(tls, server=False, hostname=tls_hostname),
    )
    with contextlib.closing(RestoreImage(path)) as opened:
        server = ImageServer(opened, options)
        with interrupts.on_interrupt(server.stop):
            await asyncio.to_thread(server.resume if resume else server.serve, uri)
        info = server.info()
    assert info is not None
    show(path, info, as_json=as_json)


def show(path: Path, info: Any, *, as_json: bool) -> None:
    """Print the figures of an image that has been served."""
    import json

    ram = info.ram
    figures = {
        "image": str(path),
        "status": "completed",
        "total_ms": info.total_time_ms,
        "requested_pages": ram.postcopy_requests,
        "normal_pages": ram.normal,
        "zero_pages": ram.duplicate,
        "bytes": ram.transferred,
    }
    if as_json:
        click.echo(json.dumps(figures))
        return
    click.echo(
        f"{path}: served in {info.total_time_ms / 1000:.2f} s: {ram.normal} pages with data, "
        f"{ram.duplicate} zero, {ram.postcopy_requests} requested"
    )


def _page_size(text: str) -> tuple[str, int]:
    """A block and its page size in bytes.

    :raises BadParameter: it is something else.
    """
    name, equals, size = text.rpartition("=")
    if not equals or not name:
        raise click.BadParameter(f"{text!r} is no BLOCK=SIZE; write for example pc.ram=2M")
    return name, Size().convert(size, None, None)
