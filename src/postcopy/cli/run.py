"""``postcopy run``: one guest with its monitors, until it is told to end."""

from typing import Any

import click

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
@click.option(
    "--accel", type=click.Choice(["auto", "kvm", "unicorn"]), default="auto", show_default=True
)
@click.option("--huge-pages", is_flag=True, help="Take the host's 2 MiB pages for the memory.")
@click.option("--incoming", metavar="URI|defer", help="Wait for a guest to come over there.")
@click.option("--paused", "-S", is_flag=True, help="Do not run before 'cont'.")
@click.option(
    "--monitor",
    "monitors",
    multiple=True,
    metavar="stdio|none|unix:PATH|tcp:HOST:PORT",
    help="Where 'info migrate' and its like are typed; stdio on a terminal.",
)
@click.option("--qmp", "qmps", multiple=True, metavar="unix:PATH|tcp:HOST:PORT")
@click.option("--name", metavar="NAME", help="What 'ps' calls the process.")
@click.option("--serial", default="none", metavar="stdio|none|file:PATH", show_default=True)
@click.pass_context
def run(context: click.Context, /, **options: Any) -> None:
    """Run a guest until 'quit', a signal or the end of the input.

    \b
    In one terminal:       postcopy run --incoming tcp:0:4444 --smp 2
    In another:            postcopy run --workload hammer --smp 2
    there, at the prompt:  migrate -d tcp:0:4444
    """  # noqa: D301 - click reads the backspace
    from postcopy.cli.guest_process import GuestProcess
    from postcopy.cli.run_settings import RunSettings

    context.exit(GuestProcess(RunSettings.of(options)).run())
