"""``postcopy recover``: both sides of a broken postcopy go on, by one command."""

import click

from postcopy.cli.types import Seconds


@click.command(short_help="Go on with a postcopy that broke.")
@click.argument("uri", required=False)
@click.option("--from", "source", required=True, metavar="QMP-ADDRESS", help="Who has the pages.")
@click.option(
    "--to", "destination", required=True, metavar="QMP-ADDRESS", help="Who runs the guest."
)
@click.option(
    "--auto-recover",
    type=Seconds(),
    metavar="SECONDS",
    help="When it breaks again, try again for so long.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def recover(
    uri: str | None,
    source: str,
    destination: str,
    auto_recover: float | None,
    as_json: bool,
) -> None:
    """Bring both sides of a postcopy that broke together again, and watch it to its end.

    They meet at URI, such as tcp:HOST:PORT or unix:PATH; without it at a free TCP port of the
    destination's host.  Exit code 4: it still needs recovery, and nothing is lost.
    """
    from postcopy.cli import drive

    drive.run(_recover(uri, source, destination, auto_recover, as_json=as_json))


async def _recover(
    uri: str | None, source: str, destination: str, auto_recover: float | None, *, as_json: bool
) -> None:
    from postcopy.cli.drive import show_to_the_end
    from postcopy.client import Machine

    async with await Machine.connect(source) as ours, await Machine.connect(destination) as theirs:
        migration = await ours.recover(uri, to=theirs, auto_recover=auto_recover)
        await show_to_the_end(migration, as_json=as_json)
