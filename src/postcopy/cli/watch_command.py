"""``postcopy watch`` and ``postcopy report``: see a migration move, live or from a recorded run."""

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import click

from postcopy.cli.command_line import Seconds

if TYPE_CHECKING:
    import asyncio

    from postcopy.watch.recording import Header, Recording
    from postcopy.watch.sample import Sample
    from postcopy.watch.server import PageServer

_INTERVAL_S: Final = 0.05
"""Between two looks at a migration that may take a second in all."""


@click.command(short_help="Show a migration as it happens, or play a recorded one.")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--from", "source", metavar="QMP-ADDRESS", help="The source, to be asked.")
@click.option("--to", "destination", metavar="QMP-ADDRESS", help="The destination, to be asked.")
@click.option(
    "--serve", metavar="HOST:PORT", help="Serve it as a page for a browser, such as 127.0.0.1:8080."
)
@click.option("--record", type=click.Path(path_type=Path), help="Write the run to a file.")
@click.option(
    "--interval", type=Seconds(), default=0.25, show_default=True, help="Seconds between two looks."
)
@click.option(
    "--speed",
    type=Seconds(),
    metavar="N",
    default=1.0,
    show_default=True,
    help="Play a recorded run N times as fast.",
)
def watch(file: Path | None, source: str | None, destination: str | None, **options: Any) -> None:
    """Show where a guest's memory is, what the migration waits for, and how fast it goes.

    It only asks the machines, of ours or stock QEMUs, and ends with the migration.  With FILE it plays a
    run that --record has written.  With --serve the page stays until Ctrl-C.
    """
    from postcopy.cli import interrupts

    asked = source is not None or destination is not None
    if (file is None) == (not asked):
        raise click.UsageError("give a FILE, or --from or --to, or both of these")
    if file is not None and options["record"] is not None:
        raise click.UsageError("--record needs --from or --to: a FILE is recorded already")
    with contextlib.suppress(BrokenPipeError):
        interrupts.run(_watch(file, source, destination, options))


async def _watch(
    file: Path | None, source: str | None, destination: str | None, options: dict[str, Any]
) -> None:
    from postcopy.watch import recording

    async with contextlib.AsyncExitStack() as stack:
        recorder = None
        if file is not None:
            found = recording.read(file)
            tell_of_cut(file, found)
            header, samples = found.header, _played(found, options)
        else:
            header, samples = await _live(stack, source, destination, options["interval"])
            if options["record"] is not None:
                recorder = recording.Recorder(options["record"], header)
                stack.callback(recorder.close)
        await _show(stack, header, samples, recorder, options["serve"])


async def _live(
    stack: contextlib.AsyncExitStack,
    source: str | None,
    destination: str | None,
    interval_s: float,
) -> tuple["Header", AsyncIterator["Sample"]]:
    import datetime as dt

    from postcopy.watch.recording import Header
    from postcopy.watch.sampler import Sampler

    sampler = Sampler(source, destination, interval_s=interval_s)
    stack.push_async_callback(sampler.close)
    await sampler.connect()
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return Header(source, destination, now), sampler.samples()


async def _played(found: "Recording", options: dict[str, Any]) -> AsyncIterator["Sample"]:
    """The samples of a file, in their own time where one watches them."""
    import asyncio

    in_time = options["serve"] is not None or sys.stdout.isatty()
    before_ms = None
    for sample in found.samples:
        if in_time and before_ms is not None:
            await asyncio.sleep((sample.t_ms - before_ms) / 1000 / options["speed"])
        before_ms = sample.t_ms
        yield sample


async def _show(
    stack: contextlib.AsyncExitStack,
    header: "Header",
    samples: AsyncIterator["Sample"],
    recorder: Any,
    serve: str | None,
) -> None:
    from postcopy.watch.terminal import FullScreenView, PlainView

    page = None
    if serve is not None:
        from postcopy.watch.server import PageServer

        page = PageServer(header)
        stack.push_async_callback(page.close)
        click.echo(f"the page is at {await page.start(serve)}; Ctrl-C ends it")
    full = sys.stdout.isatty() and page is None
    with FullScreenView() if full else PlainView() as view:
        async for sample in samples:
            if recorder is not None:
                recorder.add(sample)
            if page is not None:
                page.add(sample)
            view.show(sample)
    if page is not None:
        await _stay(page)


async def _stay(page: "PageServer") -> None:
    """Go on serving a run that has ended; Ctrl-C is how that ends, and no failure."""
    import asyncio

    page.end()
    click.echo("the run has ended; the page stays until Ctrl-C")
    with contextlib.suppress(asyncio.CancelledError):
        await page.serve_until_cancelled()


class WatchBeside:
    """A watch beside a command that moves the guest itself; used in ``async with``.

    :param record: the file to write the run to.
    :param with_page: serve the page at a free port, and open it in the user's browser.
    """

    def __init__(
        self, source: str, destination: str, record: Path | None, *, with_page: bool
    ) -> None:
        self._addresses = source, destination
        self._record = record
        self._with_page = with_page
        self._stack = contextlib.AsyncExitStack()
        self._page: PageServer | None = None
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        import asyncio
        import webbrowser

        from postcopy.watch.recording import Recorder
        from postcopy.watch.server import PageServer

        header, samples = await _live(self._stack, *self._addresses, _INTERVAL_S)
        takers = []
        if self._record is not None:
            recorder = Recorder(self._record, header)
            self._stack.callback(recorder.close)
            takers.append(recorder.add)
        if self._with_page:
            self._page = page = PageServer(header)
            self._stack.push_async_callback(page.close)
            url = await page.start("127.0.0.1:0")
            takers.append(page.add)
            opened = await asyncio.to_thread(webbrowser.open, url)
            click.echo(f"the page is at {url}{'' if opened else '; open it in a browser'}")
        self._following = asyncio.create_task(_give(samples, takers))
        return self

    async def until_end(self) -> None:
        """Wait for the last sample, and with a page for Ctrl-C."""
        if self._following is not None:
            await self._following
        if self._page is not None:
            await _stay(self._page)

    async def __aexit__(self, *_: object) -> None:
        if self._following is not None:
            self._following.cancel()
        await self._stack.aclose()


async def _give(
    samples: AsyncIterator["Sample"], takers: Sequence[Callable[["Sample"], None]]
) -> None:
    async for sample in samples:
        for take in takers:
            take(sample)


def tell_of_cut(file: Path, found: "Recording") -> None:
    """Say that the end of a file is missing."""
    if found.cut_at is not None:
        click.echo(
            f"postcopy: {file}: the last line is cut (at byte {found.cut_at:#x}), as by a recorder that "
            "was killed; it is left out",
            err=True,
        )


@click.command(short_help="Make one page to hand on of a recorded run.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The page: one HTML file.",
)
def report(file: Path, output: Path) -> None:
    """Make one self-contained HTML page of a run that 'postcopy watch --record' has written."""
    from postcopy.errors import Refused
    from postcopy.watch import recording
    from postcopy.watch.report import page_of

    found = recording.read(file)
    tell_of_cut(file, found)
    if not found.samples:
        raise Refused(f"{file} has no sample: the recorder ended before its first look")
    try:
        output.write_text(page_of(found), encoding="utf-8")
    except OSError as error:
        raise Refused(f"-o {output}: {error.strerror}; give a file that can be written") from error
    click.echo(f"{output}: {len(found.samples)} samples")
