"""Options of every command that runs a guest, in the order in which help shows them."""

import os
from collections.abc import Callable
from functools import reduce
from typing import Any, Final

import click

from postcopy.errors import Refused
from postcopy.trace import FILE_VARIABLE

Command = Callable[..., Any]


def _subscribe(_context: click.Context, _parameter: click.Parameter, file: str | None) -> None:
    """Have this process and its engines append to ``file``.

    :raises Refused: it cannot be written.
    """
    if file is None:
        return
    try:
        with open(file, "ab"):  # noqa: PTH123 - '' is no path, and must be refused
            os.environ[FILE_VARIABLE] = os.path.abspath(file)  # noqa: PTH100 - as above
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise Refused(f"--trace {file!r}: {why}; give a file that can be written") from error


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
    click.option(
        "--trace",
        metavar="FILE",
        callback=_subscribe,
        expose_value=False,
        help="Append a line of JSON for each step of a migration.",
    ),
    click.option("--name", metavar="NAME", help="What 'ps' calls the process."),
    click.option("--serial", default="none", metavar="stdio|none|file:PATH", show_default=True),
)


def options(wanted: tuple[Callable[[Command], Command], ...]) -> Callable[[Command], Command]:
    """Give a command these options, as if their decorators stood there."""
    return lambda command: reduce(lambda made, option: option(made), reversed(wanted), command)
