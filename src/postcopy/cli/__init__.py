"""The command line: one file a subcommand, and the one table of them.

Whoever is going to need an engine at once has it begin before anything else: see
:mod:`postcopy.cli.head_start`.
"""

import sys
from collections.abc import Sequence
from typing import Final

COMMANDS: Final = {
    "run": "postcopy.cli.run",
    "migrate": "postcopy.cli.migrate",
    "recover": "postcopy.cli.recover",
    "snapshot": "postcopy.cli.snapshot",
    "restore": "postcopy.cli.restore",
    "reset": "postcopy.cli.reset",
    "verify": "postcopy.cli.verify",
    "inspect": "postcopy.cli.inspect",
    "diff": "postcopy.cli.diff",
    "extract": "postcopy.cli.extract",
    "prune": "postcopy.cli.prune",
    "status": "postcopy.cli.status",
    "doctor": "postcopy.cli.doctor",
    "demo": "postcopy.cli.demo",
}
"""Subcommand: the module that has a click command of that name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; an error is one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    shared = {}
    if arguments is None:  # this process is ours alone
        from postcopy.cli import process

        process.use_utf8()
        process.leave_when_interrupted()
        process.have_standard_streams()
        from postcopy.cli.head_start import engines_for

        shared["engines"] = engines_for(given)
    from postcopy.cli import failures, process
    from postcopy.cli.commands import cli

    try:
        process.raise_when_interrupted()
        code = cli.main(given, prog_name="postcopy", standalone_mode=False, obj=shared)
        failures.check_output()
    except BaseException as error:  # the last resort: no traceback reaches a user
        process.leave_when_interrupted()
        code = failures.report(error, debug="--debug" in given)
    sys.exit(code if isinstance(code, int) else failures.DONE)
