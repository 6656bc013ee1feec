"""Write the man pages into a folder, from the commands themselves: ``make_man.py build/man``."""

import os
import pathlib
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from inspect import cleandoc

import click
from click_man.core import write_man_pages

from postcopy.cli import COMMANDS
from postcopy.cli.command_line import cli

_AS_IT_IS = "\b\n"
"""Begins a paragraph whose lines stay apart."""


def main(folder: pathlib.Path) -> None:
    """Write a page for each command and subcommand."""
    folder.mkdir(parents=True, exist_ok=True)
    context = click.Context(cli, info_name="postcopy")
    for name in COMMANDS:  # click-man asks for them all
        command = cli.get_command(context, name)
        assert command is not None
        cli.commands[name] = command
    for each in (cli, *_all_of(cli)):
        each.help = _roff(each.help or "")
    cli.short_help = "Live migration, snapshots and lazy restores of running guests"
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(seconds))
    write_man_pages("postcopy", cli, version=version("postcopy"), target_dir=folder, date=date)


def _all_of(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        yield command
        if isinstance(command, click.Group):
            yield from _all_of(command)


def _roff(text: str) -> str:
    """Keep roff from taking a line for a request, and from filling the lines that stay apart."""
    paragraphs = []
    for paragraph in cleandoc(text).split("\n\n"):
        lines = [
            f"\\&{line}" if line.startswith((".", "'")) else line
            for line in paragraph.removeprefix(_AS_IT_IS).replace("\\", "\\e").splitlines()
        ]
        between = "\n.br\n" if paragraph.startswith(_AS_IT_IS) else "\n"
        paragraphs.append(between.join(lines))
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
