"""``postcopy migrate``: move a running machine, and watch it go."""

from typing import TYPE_CHECKING, Any

import click

from postcopy.cli.types import PostcopyTime, Size

if TYPE_CHECKING:
    from postcopy.cli.progress_view import View
    from postcopy.client.result import Result


@click.command(short_help="Move a running guest over QMP, ours or QEMU's.")
@click.argument("uri")
@click.option("--from", "source", required=True, metavar="QMP-ADDRESS", help="Whose guest moves.")
@click.option("--to", "destination", metavar="QMP-ADDRESS", help="Drive the destination as well.")
@click.option("--postcopy", type=PostcopyTime(), metavar="after=first-round|after=5s|now")
@click.option("--bandwidth", type=Size("M"), metavar="SIZE", help="Most a second, such as 1G.")
@click.option("--downtime-limit", type=click.IntRange(0), metavar="MS")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="S")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def migrate(**options: Any) -> None:
    """Move the guest of one machine to URI, such as tcp:HOST:PORT or unix:PATH.

    Ctrl-C cancels as long as the guest has not moved.  With --to the destination is told what it
    must know, and asked at the end how long its vCPUs waited for pages.
    """
    from postcopy.cli import drive

    drive.run(_migrate(**options))


async def _migrate(
    *,
    uri: str,
    source: str,
    destination: str | None,
    timeout: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    import contextlib

    from postcopy.cli import progress_view
    from postcopy.cli.drive import Watch
    from postcopy.client import Machine
    from postcopy.errors import PostcopyError

    view = progress_view.choose(as_json=as_json)
    async with contextlib.AsyncExitStack() as machines:
        ours = await machines.enter_async_context(await Machine.connect(source))
        theirs = None
        if destination is not None:
            theirs = await machines.enter_async_context(await Machine.connect(destination))
        migration = await ours.migrate(
            uri,
            to=theirs,
            postcopy=options["postcopy"],
            bandwidth=options["bandwidth"],
            downtime_limit_ms=options["downtime_limit"],
        )
        try:
            with view:
                result = await Watch(migration, view).until_end(timeout)
        except PostcopyError as error:
            view.finish({"status": migration.status.value, "error": str(error)})
            raise
        _tell(result, view, as_json=as_json)


def _tell(result: "Result", view: "View", *, as_json: bool) -> None:
    from postcopy.cli import report

    view.finish({"status": "completed"} | result.to_json())
    if not as_json:
        click.echo(report.text(list(report.lines(result))))
