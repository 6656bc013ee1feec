"""The command line: the table of its subcommands, and its entry point.

A command that needs an engine at once forks it before all other work: see :mod:`postcopy.cli.prefork`.
"""

import gc
import sys
from collections.abc import Sequence
from typing import Final

_OBJECTS_BEFORE_COLLECTION: Final = 50_000
"""Importing creates few cycles; with Python's 700 the collector takes a tenth of a process's start."""

COMMANDS: Final = {
    "run": "postcopy.cli.run",
    "migrate": "postcopy.cli.migrate",
    "recover": "postcopy.cli.migrate",
    "snapshot": "postcopy.cli.snapshot",
    "restore": "postcopy.cli.run",
    "receive": "postcopy.cli.receive",
    "serve": "postcopy.cli.serve",
    "preflight": "postcopy.cli.preflight",
    "reset": "postcopy.cli.reset",
    "verify": "postcopy.cli.image_commands",
    "inspect": "postcopy.cli.image_commands",
    "diff": "postcopy.cli.image_commands",
    "extract": "postcopy.cli.image_commands",
    "convert": "postcopy.cli.convert",
    "prune": "postcopy.cli.image_commands",
    "status": "postcopy.cli.status",
    "watch": "postcopy.cli.watch_command",
    "report": "postcopy.cli.watch_command",
    "vhost-user-blk": "postcopy.cli.vhost_user",
    "bench": "postcopy.cli.bench",
    "tls": "postcopy.cli.tls",
    "doctor": "postcopy.cli.doctor",
    "demo": "postcopy.cli.demo",
}
"""For each subcommand the module with a click command of that name, ``_`` in place of ``-``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its exit code; an error is one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    shared = {}
    if arguments is None:  # the process runs this command only
        gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
        from postcopy.cli import process

        process.use_utf8()
        process.exit_when_interrupted()
        process.have_standard_streams()
        from postcopy.cli.prefork import engines_for

        shared["engines"] = engines_for(given)
    from postcopy.cli import failures, process
    from postcopy.cli.command_line import cli

    try:
        process.raise_when_interrupted()
        code = cli.main(given, prog_name="postcopy", standalone_mode=False, obj=shared)
        failures.check_output()
    except BaseException as error:  # of any kind: a user sees no traceback
        process.exit_when_interrupted()
        code = failures.report(error, debug="--debug" in given)
    sys.exit(code if isinstance(code, int) else failures.DONE)
