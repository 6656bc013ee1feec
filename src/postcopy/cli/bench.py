"""``postcopy bench``: measure the link between two hosts, and forecast migrations over it."""

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any

import click

from postcopy.cli.command_line import TLS, TLS_HOSTNAME, Seconds, Size, Time

if TYPE_CHECKING:
    from postcopy.bench.server import Server


@click.command(short_help="Measure a link, and what migrations over it would take.")
@click.argument("uri")
@click.option("--listen", is_flag=True, help="Be the other end: wait at URI, until stopped.")
@click.option("--once", is_flag=True, help="With --listen: end after one measurement.")
@click.option("--memory", type=Size("M"), metavar="SIZE", help="Of a guest: what is not zero.")
@click.option(
    "--dirty-rate",
    type=Size("M"),
    default="0",
    metavar="SIZE",
    help="How much the guest writes a second, such as 200M.",
)
@click.option(
    "--working-set",
    type=Size("M"),
    metavar="SIZE",
    help="To how much it writes; default: all its memory.",
)
@click.option(
    "--downtime-limit",
    type=Time(),
    default="300ms",
    show_default=True,
    metavar="TIME",
    help="How long the guest may stand still.",
)
@click.option(
    "--bandwidth",
    type=Size("M"),
    default="0",
    metavar="SIZE",
    help="Limit a second that the migration will have; default: none.",
)
@click.option(
    "--multifd", type=click.IntRange(1, 16), metavar="N", help="Measure N connections at once, too."
)
@click.option(
    "--compress", type=click.Choice(["zlib", "zstd"]), help="With --multifd: of this host."
)
@click.option(
    "--seconds",
    type=Seconds(),
    default="1",
    show_default=True,
    metavar="S",
    help="How long each load of the link is: there are two, or three.",
)
@TLS
@TLS_HOSTNAME
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def bench(uri: str, **options: Any) -> None:
    """Measure the link from this host to another, where 'postcopy bench --listen URI' runs.

    \b
    There:  postcopy bench --listen tcp:0.0.0.0:4444
    Here:   postcopy bench tcp:there:4444 --memory 4G --dirty-rate 200M

    With --memory a table says what a migration of such a guest would take by precopy, by postcopy and by
    both, what the guest would wait for, and why.  Nothing of a machine is needed or changed.
    """  # noqa: D301 - click reads the backspace
    from postcopy.cli import interrupts
    from postcopy.errors import Refused

    once, tls = options.pop("once"), options["tls"]
    if options.pop("listen"):
        interrupts.run(_listen(uri, tls, once=once))
    elif once:
        raise Refused("--once is for the end that listens; give --listen, too")
    else:
        interrupts.run(_measure(uri, **options))


async def _listen(uri: str, tls: str | None, *, once: bool) -> None:
    from postcopy.bench.server import Server
    from postcopy.channel.address import TcpAddress, UnixAddress, bound_uri, parse
    from postcopy.channel.listen import Listener
    from postcopy.channel.tls_listener import TlsListener
    from postcopy.cli.tls import options_of
    from postcopy.errors import Refused

    address = parse(uri)
    if not isinstance(address, TcpAddress | UnixAddress):
        raise Refused(f"{uri}: a link is measured to tcp:HOST:PORT or unix:PATH")
    options = options_of(tls, server=True, hostname=None)
    made = Listener(address) if options is None else TlsListener(address, options, _say)
    with made as listener:
        server = Server(listener, _say)
        _say(f"listening at {bound_uri(uri, listener.described())}")
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, server.stop)
        try:
            await _until_end(server, once=once)
        finally:
            loop.remove_signal_handler(signal.SIGTERM)


async def _until_end(server: "Server", *, once: bool) -> None:
    work = asyncio.create_task(asyncio.to_thread(server.run, once=once))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        server.stop()
        await asyncio.wait({work})
        work.exception()  # asyncio logs one that no caller has retrieved
        raise


def _say(text: str) -> None:
    """Of any thread: a line as soon as it is known."""
    click.echo(text)


async def _measure(
    uri: str,
    *,
    memory: int | None,
    dirty_rate: int,
    working_set: int | None,
    downtime_limit: float,
    bandwidth: int,
    as_json: bool,
    **options: Any,
) -> None:
    from postcopy.bench.forecast import Forecast, Way, lines_of_ways, way_to_json
    from postcopy.bench.link_bench import guest_of, measure_link
    from postcopy.cli.progress_view import as_table

    found = await measure_link(uri, **options)
    guest, ways = None, list[Way]()
    if memory:
        guest = guest_of(memory, dirty_rate, working_set, round(1000 * downtime_limit), bandwidth)
        ways = [*Forecast(found.link, found.compression, guest).ways()]
    if as_json:
        click.echo(json.dumps(found.to_json() | {"ways": [way_to_json(way) for way in ways]}))
        return
    click.echo(as_table([*found.lines()]))
    if guest is not None:
        click.echo("")
        for line in lines_of_ways(guest, ways):
            click.echo(line)
        if not bandwidth:
            click.echo(
                "\nA machine keeps precopy to its max-bandwidth, 128 MiB/s unless set: --bandwidth."
            )
