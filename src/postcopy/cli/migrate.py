"""``postcopy migrate``: move a running machine, and watch it go."""

from typing import Any

import click

from postcopy.cli.failures import CommandFailed
from postcopy.cli.types import PostcopyTime, Seconds, Size


@click.command(short_help="Move a running guest over QMP, ours or QEMU's.")
@click.argument("uri")
@click.option("--from", "source", required=True, metavar="QMP-ADDRESS", help="Whose guest moves.")
@click.option("--to", "destination", metavar="QMP-ADDRESS", help="Drive the destination as well.")
@click.option("--postcopy", type=PostcopyTime(), metavar="after=first-round|after=5s|now")
@click.option("--bandwidth", type=Size("M"), metavar="SIZE", help="Most a second, such as 1G.")
@click.option("--downtime-limit", type=click.IntRange(0), metavar="MS")
@click.option("--timeout", type=Seconds(), metavar="S")
@click.option(
    "--auto-recover",
    type=Seconds(),
    metavar="SECONDS",
    help="After a break, recover unasked for so long; needs --to.",
)
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
    import asyncio
    import contextlib

    from postcopy.cli.drive import show_to_the_end
    from postcopy.client import Machine
    from postcopy.errors import Refused

    if options["auto_recover"] and destination is None:
        raise Refused("--auto-recover must drive the destination too; give --to QMP-ADDRESS")
    clock = asyncio.get_running_loop().time
    until = None if timeout is None else clock() + timeout
    async with contextlib.AsyncExitStack() as machines:
        try:
            async with asyncio.timeout_at(until):
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
                    auto_recover=options["auto_recover"],
                )
        except TimeoutError:
            raise CommandFailed(
                f"not finished within {timeout:g} s: a machine does not answer, and may do still what "
                f"it was told; 'postcopy status --from {source}' tells whether it has begun"
            ) from None
        await show_to_the_end(
            migration, as_json=as_json, timeout_s=timeout, left_s=until and until - clock()
        )
