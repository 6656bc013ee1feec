"""Options of every command that runs a guest, in the order in which help shows them."""

from collections.abc import Callable
from functools import reduce
from typing import Any, Final

import click

Command = Callable[..., Any]

ACCELERATION: Final = (
    click.option(
        "--accel", type=click.Choice(["auto", "kvm", "unicorn"]), default="auto", show_default=True
    ),
    click.option("--huge-pages", is_flag=True, help="Take the host's 2 MiB pages for the memory."),
)
MONITORS: Final = (
    click.option("--paused", "-S", is_flag=True, help="Do not run before 'cont'."),
    click.option(
        "--monitor",
        "monitors",
        multiple=True,
        metavar="stdio|none|unix:PATH|tcp:HOST:PORT",
        help="Where 'info migrate' and its like are typed; stdio on a terminal.",
    ),
    click.option("--qmp", "qmps", multiple=True, metavar="unix:PATH|tcp:HOST:PORT"),
    click.option("--name", metavar="NAME", help="What 'ps' calls the process."),
    click.option("--serial", default="none", metavar="stdio|none|file:PATH", show_default=True),
)


def options(wanted: tuple[Callable[[Command], Command], ...]) -> Callable[[Command], Command]:
    """Give a command these options, as if their decorators stood there."""
    return lambda command: reduce(lambda made, option: option(made), reversed(wanted), command)
