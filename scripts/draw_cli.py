"""Write ``docs/cli.md`` from the commands themselves; ``--check`` only says whether it is current."""

import pathlib
import sys

import click

from postcopy.cli import COMMANDS
from postcopy.cli.command_line import cli

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """\
# The command line

Made by `scripts/draw_cli.py` from the commands themselves; do not edit it here.

A command that drives a machine takes the address of its QMP monitor: `unix:PATH` or `tcp:HOST:PORT`, of a
machine of ours or of a stock QEMU. An error is one line on standard error: what, why and the cure.
`postcopy --install-completion` has bash, zsh or fish complete commands and options.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | it failed; the text says where the guest is |
| 2 | the command line is wrong |
| 3 | refused before anything happened |
| 4 | a postcopy broke after the switchover: nothing is lost, recover it |
"""


def page() -> str:
    """The whole page."""
    rows = [f"| [`{name}`](#postcopy-{name}) | {_found(name).short_help} |\n" for name in COMMANDS]
    table = f"\n| command | |\n| --- | --- |\n{''.join(rows)}"
    return HEAD + table + "".join(_section(name) for name in COMMANDS)


def _found(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def _section(name: str) -> str:
    context = click.Context(_found(name), info_name=f"postcopy {name}", terminal_width=100)
    context.help_option_names = ["-h", "--help"]
    return f"\n## postcopy {name}\n\n```\n{_found(name).get_help(context)}\n```\n"


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE.name} is not what the commands say: run scripts/draw_cli.py")
