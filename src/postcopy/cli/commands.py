"""The group of all subcommands.

A subcommand's file imports only click at first; what its work needs it imports when it works, so that
``--help`` and completion come at once.
"""

import importlib

import click

from postcopy.cli import COMMANDS


class _Subcommands(click.Group):
    """Takes subcommands from the table, each when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name]), cmd_name)
        return command


@click.command(cls=_Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="postcopy", prog_name="postcopy")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Running memory that moves: live migration of a guest, by precopy and postcopy.

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 refused beforehand, 4 needs recovery.
    """  # noqa: D301 - click reads the backspace
    context.obj = {**(context.obj or {}), "debug": debug}
