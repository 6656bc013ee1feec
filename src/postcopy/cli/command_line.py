"""The group of all subcommands, and options that several of them share.

A module of subcommands imports only click at first, and the rest when a subcommand runs, so that ``--help``
and completion are fast.
"""

import importlib
import math
import os
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, Final

import click

from postcopy.cli import COMMANDS, completion
from postcopy.errors import Refused
from postcopy.sizes import parse_size
from postcopy.trace import FILE_VARIABLE

Command = Callable[..., Any]

_MOST: Final = (1 << 63) - 1
_MOST_SHOWN: Final = 80
_BYTES: Final = re.compile(r"(?i)([kmgtpe])i?b$")


class _Subcommands(click.Group):
    """Imports a subcommand's module when the subcommand is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command


@click.command(cls=_Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@completion.INSTALL
@click.version_option(package_name="postcopy", prog_name="postcopy")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Live migration of a running guest, by precopy and postcopy.

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 refused beforehand, 4 needs recovery.
    """  # noqa: D301 - click reads the backspace
    context.obj = {**(context.obj or {}), "debug": debug}


class Size(click.ParamType[int]):
    """Bytes as QEMU reads them, with a suffix such as M, MB or MiB (powers of 1024).

    :param default_unit: the unit of a number without a suffix.
    """

    name = "size"

    def __init__(self, default_unit: str = "b") -> None:
        self._default_unit = default_unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        text = _BYTES.sub(r"\1", str(value).strip())
        try:
            return parse_size(text, default_unit=self._default_unit, most=_MOST)
        except ValueError:
            self.fail(f"{_short(value)} is no size; write a number with K, M or G", param, ctx)


class Number(click.ParamType[int]):
    """An integer, decimal or with 0x."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The integer."""
        try:
            number = value if isinstance(value, int) else int(value, 0)
        except ValueError:
            number = -1
        if not 0 <= number <= _MOST:
            self.fail(f"{_short(value)} is no number; write it in decimal or with 0x", param, ctx)
        return number


class Seconds(click.ParamType[float]):
    """A time in seconds, more than 0."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The time."""
        seconds = _seconds(value)
        if not seconds > 0:
            self.fail(f"{_short(value)} is no time; give seconds, such as 5 or 0.5", param, ctx)
        return seconds


class Time(click.ParamType[float]):
    """A time with its unit: ``300ms``, ``60s``, ``5min``."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The seconds."""
        if isinstance(value, float):
            return value
        units = {"ms": 0.001, "min": 60.0, "s": 1.0}
        unit = next((unit for unit in units if str(value).endswith(unit)), None)
        seconds = 0.0 if unit is None else _seconds(str(value).removesuffix(unit)) * units[unit]
        if not seconds > 0:
            hint = "give it with its unit, such as 300ms, 60s or 5min"
            self.fail(f"{_short(value)} is no time; {hint}", param, ctx)
        return seconds


class PostcopyTime(click.ParamType[str | float]):
    """When to switch to postcopy: ``now``, ``after=first-round`` or ``after=5s``."""

    name = "when"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | float:
        """The value of the client's option ``postcopy``."""
        text = str(value).removeprefix("after=")
        if text in {"now", "first-round"}:
            return text
        seconds = _seconds(text.removesuffix("s"))
        if seconds < 0:
            hint = "give now, after=first-round or after=5s"
            self.fail(f"{_short(value)} is no time; {hint}", param, ctx)
        return seconds


class MemoryBlockOption(click.ParamType[dict[str, Any]]):
    """A RAM block: ``name=NAME,size=SIZE,page-size=SIZE,path=DIR``; all but the name may be left out."""

    name = "block"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Its keys and values; sizes in bytes."""
        sizes = {"size": Size("M"), "page-size": Size()}
        found: dict[str, Any] = {}
        for part in str(value).split(","):
            key, equals, text = part.partition("=")
            if not equals or key not in {"name", "path", *sizes} or key in found:
                hint = "write name=NAME,size=SIZE,page-size=SIZE,path=DIR, each at most once"
                self.fail(f"{_short(part)} is no property of a RAM block; {hint}", param, ctx)
            found[key] = sizes[key].convert(text, param, ctx) if key in sizes else text
        if not found.get("name"):
            self.fail(f"{_short(value)} gives the RAM block no name; add name=NAME", param, ctx)
        return found


def _seconds(value: Any) -> float:
    """A finite number of seconds; -1 for all else."""
    try:
        seconds = float(value)
    except ValueError:
        return -1.0
    return seconds if math.isfinite(seconds) else -1.0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _subscribe(_context: click.Context, _parameter: click.Parameter, file: str | None) -> None:
    """Make this process and its engines append trace points to ``file``.

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
        "--accel",
        type=click.Choice(["auto", "kvm", "unicorn"]),
        default="auto",
        show_default=True,
        help="What runs the guest; auto: KVM if it can be used, and else unicorn.",
    ),
    click.option("--huge-pages", is_flag=True, help="Use 2 MiB pages for the guest's memory."),
    click.option(
        "--memory-block",
        "memory_blocks",
        multiple=True,
        type=MemoryBlockOption(),
        metavar="name=NAME,size=SIZE[,page-size=4K|2M|1G][,path=DIR]",
        help="A RAM block; several follow one another in the guest's addresses.",
    ),
    click.option(
        "--mem-path", metavar="DIR", help="A tmpfs or hugetlbfs for the files of the memory."
    ),
)
DRIVE: Final = (
    click.option(
        "--drive",
        metavar="FILE",
        help="A raw file or block device as the guest's disk; the same disk at both sides.",
    ),
    click.option(
        "--vhost-user-blk",
        metavar="SOCKET",
        help="A vhost-user back end as the guest's disk, in place of --drive.",
    ),
    click.option(
        "--vhost-user-net",
        metavar="SOCKET",
        help="A vhost-user back end as the guest's network device, in place of a disk.",
    ),
)
TLS: Final = click.option(
    "--tls", metavar="DIR", help="Encrypt with the certificates there; see 'postcopy tls init'."
)
TLS_HOSTNAME: Final = click.option(
    "--tls-hostname",
    metavar="NAME",
    help="With --tls: the name in the destination's certificate; default: that of the URI.",
)
OBJECTS: Final = (
    TLS,
    click.option(
        "--object",
        "objects",
        multiple=True,
        metavar="tls-creds-x509,id=NAME,dir=DIR,endpoint=client|server|...",
        help="An object, as QEMU's --object makes it.",
    ),
)
MONITORS: Final = (
    click.option("--paused", "-S", is_flag=True, help="Do not run before 'cont'."),
    click.option(
        "--monitor",
        "monitors",
        multiple=True,
        metavar="stdio|none|unix:PATH|tcp:HOST:PORT",
        help="An HMP monitor; on a terminal the default is stdio.",
    ),
    click.option(
        "--qmp", "qmps", multiple=True, metavar="unix:PATH|tcp:HOST:PORT", help="A QMP monitor."
    ),
    click.option(
        "--metrics",
        multiple=True,
        metavar="tcp:[HOST]:PORT|unix:PATH",
        help="Serve metrics to Prometheus; the default HOST is 127.0.0.1.",
    ),
    click.option(
        "--trace",
        metavar="FILE",
        callback=_subscribe,
        expose_value=False,
        help="Append each trace point as a line of JSON.",
    ),
    click.option("--name", metavar="NAME", help="Name of the process in 'ps'."),
    click.option(
        "--serial",
        default="none",
        metavar="stdio|none|file:PATH",
        show_default=True,
        help="Where the output of the guest's serial port goes.",
    ),
)


def options(wanted: tuple[Callable[[Command], Command], ...]) -> Callable[[Command], Command]:
    """Decorate a command with these options."""
    return lambda command: reduce(lambda made, option: option(made), reversed(wanted), command)


_FORM_OF_IMAGE = (
    click.option(
        "--format",
        "form",
        type=click.Choice(["mapped-ram", "stream"]),
        default="mapped-ram",
        show_default=True,
        help="Pages at fixed offsets, for restores; or a plain stream.",
    ),
    click.option(
        "--compress", type=click.Choice(["zstd"]), help="Put the memory into a store of chunks."
    ),
    click.option(
        "--parent",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="An image whose store of chunks is shared: only changed memory takes space.",
    ),
)


def form_of_image(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say in which form an image is written."""
    for option in reversed(_FORM_OF_IMAGE):
        command = option(command)
    return command
