"""``postcopy run``: one guest with its monitors, until it is told to end."""

from typing import Any

import click

from postcopy.cli.run_options import ACCELERATION, MONITORS, options
from postcopy.cli.types import Number, Size

_WORKLOADS = ("hammer", "idle", "sweep")  # those of machine/workload.py, which takes long to import
_LOAD_ADDRESS = 0x10000


@click.command(short_help="Run a guest, or wait for one to come.")
@click.option("--image", type=click.Path(exists=True, dir_okay=False), help="Raw 64-bit code.")
@click.option("--load-address", type=Number(), default=_LOAD_ADDRESS, metavar="ADDRESS")
@click.option("--entry", type=Number(), metavar="ADDRESS", help="Where it begins: load address.")
@click.option("--privilege", type=click.Choice(["0", "3"]), default="3", show_default=True)
@click.option("--workload", type=click.Choice(_WORKLOADS), help="A guest that comes with us.")
@click.option(
    "--machine",
    "-M",
    type=click.Choice(["microvm", "none"]),
    default="microvm",
    show_default=True,
    help="Which of QEMU's machines it is; both sides alike.",
)
@click.option("--memory", "-m", type=Size("M"), default="512M", show_default=True)
@click.option("--smp", type=click.IntRange(1), default=1, show_default=True, help="vCPUs.")
@options(ACCELERATION)
@click.option("--incoming", metavar="URI|defer", help="Wait for a guest to come over there.")
@options(MONITORS)
@click.pass_context
def run(context: click.Context, /, **given: Any) -> None:
    """Run a guest until 'quit', a signal or the end of the input.

    \b
    In one terminal:       postcopy run --incoming tcp:0:4444 --smp 2
    In another:            postcopy run --workload hammer --smp 2
    there, at the prompt:  migrate -d tcp:0:4444
    """  # noqa: D301 - click reads the backspace
    from postcopy.cli.guest_process import GuestProcess
    from postcopy.cli.run_settings import RunSettings

    context.exit(GuestProcess(RunSettings.of(given), context.obj.get("engines")).run())
