"""``postcopy receive``: a running QEMU migrates into an image."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from postcopy.cli.command_line import TLS, form_of_image

if TYPE_CHECKING:
    from postcopy.cli.progress_view import View
    from postcopy.client.progress import Progress
    from postcopy.image.options import Form, ImageOptions
    from postcopy.receive.receiver import ReceivedImage, ReceiveProgress, Receiver

_MIB = 1 << 20
_LOOK_S: Final = 0.1
_RECEIVED: Final = 0.95
"""The share of the work that is done when all has arrived once."""


@click.command(short_help="Receive the migration of a running QEMU as an image.")
@click.argument("uri")
@click.argument("image", type=click.Path(path_type=Path))
@form_of_image
@TLS
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def receive(
    uri: str,
    image: Path,
    form: "Form",
    compress: str | None,
    parent: Path | None,
    tls: str | None,
    as_json: bool,
) -> None:
    """Wait at URI for a migration, and make an image of what arrives, with its manifest.

    The source is a stock QEMU, or a machine of ours, that is told to 'migrate' there; with xbzrle, and
    with multifd of up to 255 channels, plain or compressed by zlib or zstd.  It migrates without postcopy.
    With the capability return-path it has completed only when the image is on the disk.  If anything
    fails, there is no image, and the guest stays at the source.

    \b
    URI: tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND or file:PATH.
    """  # noqa: D301 - click reads the backspace
    from postcopy.cli import interrupts
    from postcopy.image.options import ImageOptions

    wanted = ImageOptions(form, compress is not None, parent and parent.absolute())
    interrupts.run(_receive(uri, image, wanted, tls, as_json=as_json))


async def _receive(
    uri: str, image: Path, wanted: "ImageOptions", tls: str | None, *, as_json: bool
) -> None:
    from postcopy.channel.address import bound_uri, parse
    from postcopy.channel.listen import Listener
    from postcopy.channel.tls_listener import TlsListener
    from postcopy.cli import progress_view
    from postcopy.cli.tls import options_of
    from postcopy.errors import PostcopyError
    from postcopy.image.publish import check_free
    from postcopy.receive.receiver import Receiver

    check_free(image.absolute())
    view = progress_view.choose(as_json=as_json)
    options, address = options_of(tls, server=True, hostname=None), parse(uri)
    made = Listener(address) if options is None else TlsListener(address, options, view.note)
    with made as listener:
        receiver = Receiver(listener, image, view.note, wanted)
        try:
            with view, _on_end(receiver.cancel):
                view.note(f"waiting for a migration to {bound_uri(uri, listener.described())}")
                received = await _until_end(receiver, view)
        except (PostcopyError, OSError) as error:
            view.finish({"status": "failed", "error": str(error)})
            raise
    view.finish({"status": "completed"} | received.to_json())
    if not as_json:
        click.echo(progress_view.as_table(list(_lines(received))))


async def _until_end(receiver: "Receiver", view: "View") -> "ReceivedImage":
    """Show it until it ends; Ctrl-C gives it up, unless it is being published."""
    work = asyncio.create_task(asyncio.to_thread(receiver.run))
    try:
        shown = None
        while not work.done():
            look = receiver.progress
            if look.connected and look != shown:
                view.show(_as_progress(look, shown))
                shown = look
            await asyncio.wait({work}, timeout=_LOOK_S)
        return await work
    except asyncio.CancelledError:
        receiver.cancel()
        await asyncio.wait({work})
        work.exception()  # asyncio logs one that no caller has retrieved
        raise


def _as_progress(look: "ReceiveProgress", last: "ReceiveProgress | None") -> "Progress":
    from postcopy.client.progress import Phase, Progress
    from postcopy.status import Status

    span_ms = look.elapsed_ms - (0 if last is None else last.elapsed_ms)
    grown = look.received_bytes - (0 if last is None else last.received_bytes)
    share = min(1.0, look.page_bytes / look.ram_bytes) if look.ram_bytes else 0.0
    return Progress(
        phase=Phase.DIGESTS if look.finishing else Phase.SAVING,
        status=Status.ACTIVE,
        elapsed_ms=look.elapsed_ms,
        fraction=_RECEIVED if look.finishing else _RECEIVED * share,
        round=0,
        transferred_bytes=look.received_bytes,
        remaining_bytes=max(0, look.ram_bytes - look.page_bytes),
        total_bytes=look.ram_bytes,
        rate_bytes=0 if span_ms <= 0 else grown * 1000 // span_ms,
        dirty_rate_bytes=0,
        faults=0,
        faults_per_s=0,
    )


@contextlib.contextmanager
def _on_end(callback: Callable[[], object]) -> Iterator[None]:
    """Make SIGTERM call ``callback``: what is half-written is removed by this process."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, callback)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _lines(received: "ReceivedImage") -> Iterator[tuple[str, str]]:
    """The figures for a user."""
    yield "image", f"{received.path} ({received.format})"
    yield "machine", received.machine
    yield (
        "total time",
        f"{received.total_ms / 1000:.2f} s, of which {received.finishing_ms / 1000:.2f} s after the "
        "last byte had come",
    )
    channels = f" on {received.channels + 1} channels" if received.channels else ""
    yield "received", f"{received.received_bytes / _MIB:.1f} MiB{channels}"
    deltas = f", {received.xbzrle_pages} as deltas" if received.xbzrle_pages else ""
    yield "pages", f"{received.pages} with data, {received.zero_pages} zero{deltas}"
    yield (
        "memory",
        f"{received.ram_bytes / _MIB:.0f} MiB: {received.data_bytes / _MIB:.1f} with data, "
        f"{received.zero_bytes / _MIB:.1f} zero",
    )
    yield "devices", f"{received.device_bytes} bytes"
    yield "file", f"{received.file_bytes / _MIB:.1f} MiB on the disk"
    yield "identity", received.identity
