"""``postcopy migrate`` and ``postcopy recover``: migrate a running guest, and watch the migration."""

from typing import TYPE_CHECKING, Any

import click

from postcopy.cli.command_line import TLS, TLS_HOSTNAME, PostcopyTime, Seconds, Size, Time
from postcopy.cli.failures import CommandFailed

if TYPE_CHECKING:
    from postcopy.client.deadline import Then


@click.command(short_help="Migrate a running guest over QMP, ours or QEMU's.")
@click.argument("uri", required=False)
@click.option("--from", "source", required=True, metavar="QMP-ADDRESS", help="The source.")
@click.option(
    "--to", "destination", metavar="QMP-ADDRESS", help="The destination, to be driven as well."
)
@click.option(
    "--postcopy",
    type=PostcopyTime(),
    metavar="after=first-round|after=5s|now",
    help="Switch to postcopy then, unless precopy has ended.",
)
@click.option("--bandwidth", type=Size("M"), metavar="SIZE", help="Limit a second, such as 1G.")
@click.option(
    "--downtime-limit",
    type=click.IntRange(0),
    metavar="MS",
    help="How long the guest may stand still at the switchover, in milliseconds.",
)
@click.option(
    "--within",
    type=Time(),
    metavar="TIME",
    help="Judge after each round whether it ends in that time, such as 60s or 5min.",
)
@click.option(
    "--max-downtime",
    type=Time(),
    default="300ms",
    show_default=True,
    metavar="TIME",
    help="With --within and --estimate: the longest stop.",
)
@click.option(
    "--then",
    type=click.Choice(["postcopy", "cancel", "force"]),
    default="postcopy",
    show_default=True,
    help="With --within: what to do if it does not; force stops the guest for as long as the rest takes.",
)
@TLS
@TLS_HOSTNAME
@click.option(
    "--timeout",
    type=Seconds(),
    metavar="S",
    help="Cancel what has not ended after so many seconds; a postcopy that has begun goes on.",
)
@click.option(
    "--multifd",
    type=click.IntRange(1, 255),
    metavar="N",
    help="Precopy over N more connections; without --to the destination must be set so, too.",
)
@click.option(
    "--compress",
    type=click.Choice(["zlib", "zstd"]),
    help="With --multifd: compress the pages.",
)
@click.option(
    "--auto-recover",
    type=Seconds(),
    metavar="SECONDS",
    help="After a break, try to recover for so long; needs --to.",
)
@click.option(
    "--estimate",
    "only_estimate",
    is_flag=True,
    help="Change nothing: say whether a precopy converges, and what it and a postcopy would take.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def migrate(**options: Any) -> None:
    """Migrate the guest of one machine to URI, such as tcp:HOST:PORT or unix:PATH.

    Ctrl-C cancels before the switchover.  With --to the command sets the destination's capabilities, makes
    it listen, and reports how long its vCPUs waited for pages.  DIR of --tls is a folder of both hosts.
    """
    from postcopy.cli import interrupts

    interrupts.run(_migrate(**options))


async def _migrate(
    *,
    uri: str | None,
    source: str,
    destination: str | None,
    timeout: float | None,
    within: float | None,
    max_downtime: float,
    then: "Then",
    only_estimate: bool,
    as_json: bool,
    **options: Any,
) -> None:
    import asyncio
    import contextlib

    from postcopy.cli.watch import show_to_the_end
    from postcopy.client import Machine
    from postcopy.client.deadline import Deadline
    from postcopy.errors import Refused

    if only_estimate:
        await _estimate(source, options["bandwidth"], max_downtime, within, as_json=as_json)
        return
    if uri is None:
        raise Refused("no destination; give its URI, such as tcp:HOST:PORT, or --estimate")
    deadline = within and Deadline(within, round(1000 * max_downtime), then)
    if options["auto_recover"] and destination is None:
        raise Refused("--auto-recover needs the destination; give --to QMP-ADDRESS")
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
                    deadline=deadline or None,
                    bandwidth=options["bandwidth"],
                    downtime_limit_ms=options["downtime_limit"],
                    auto_recover=options["auto_recover"],
                    tls=options["tls"],
                    tls_hostname=options["tls_hostname"],
                    multifd=options["multifd"],
                    compress=options["compress"],
                )
        except TimeoutError:
            raise CommandFailed(
                f"not finished within {timeout:g} s: a machine does not answer, and may carry out the "
                f"order later; 'postcopy status --from {source}' shows its state"
            ) from None
        await show_to_the_end(
            migration, as_json=as_json, timeout_s=timeout, left_s=until and until - clock()
        )


async def _estimate(
    source: str, bandwidth: int | None, max_downtime: float, within: float | None, *, as_json: bool
) -> None:
    import json

    from postcopy.client import Machine

    async with await Machine.connect(source) as machine:
        found = await machine.estimate(
            bandwidth=bandwidth, max_downtime_ms=round(1000 * max_downtime), within_s=within
        )
    for line in [json.dumps(found.to_json())] if as_json else found.lines():
        click.echo(line)


@click.command(short_help="Recover a postcopy that broke.")
@click.argument("uri", required=False)
@click.option(
    "--from",
    "source",
    required=True,
    metavar="QMP-ADDRESS",
    help="The source, which has the pages.",
)
@click.option(
    "--to",
    "destination",
    required=True,
    metavar="QMP-ADDRESS",
    help="The destination, which runs the guest.",
)
@click.option(
    "--auto-recover",
    type=Seconds(),
    metavar="SECONDS",
    help="After another break, try again for so long.",
)
@TLS
@TLS_HOSTNAME
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def recover(source: str, destination: str, as_json: bool, **options: Any) -> None:
    """Connect both sides of a broken postcopy again, and watch the migration to its end.

    The destination listens at URI, such as tcp:HOST:PORT or unix:PATH; the default is a free TCP port of
    its host.  Give --tls again if the migration had it.  Exit code 4: it still needs recovery, and nothing
    is lost.
    """
    from postcopy.cli import interrupts

    interrupts.run(_recover(source, destination, options, as_json=as_json))


async def _recover(
    source: str, destination: str, options: dict[str, Any], *, as_json: bool
) -> None:
    from postcopy.cli.watch import show_to_the_end
    from postcopy.client import Machine

    async with await Machine.connect(source) as ours, await Machine.connect(destination) as theirs:
        migration = await ours.recover(to=theirs, **options)
        await show_to_the_end(migration, as_json=as_json)
