"""Error messages and exit codes of failed commands."""

import traceback
from typing import Final

import click

from postcopy.cli.process import flush_output, notice
from postcopy.errors import NeedsRecovery, PostcopyError, Refused

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
REFUSED: Final = 3
NEEDS_RECOVERY: Final = 4

_PATIENCE_S: Final = 10.0
"""If standard error blocks for longer, the last line is dropped."""


class CommandFailed(Exception):
    """A command has failed; the message is complete."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_output() -> None:
    """Flush standard output.

    :raises CommandFailed: not all could be written, as to a full disk.
    """
    why = flush_output()
    if why is not None:
        raise CommandFailed(f"standard output: {why}; look at it and try again")


def report(error: BaseException, *, debug: bool = False) -> int:
    """Print ``error`` as one line on stderr, after its traceback if ``debug``.

    :return: the exit code.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if debug:
        traceback.print_exception(error)
    line, code = _verdict(error)
    if line:
        notice(line, within_s=_PATIENCE_S)
    return code


def _verdict(error: BaseException) -> tuple[str, int]:
    if isinstance(error, PostcopyError):
        return str(error), _exit_code(error)
    if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
        return _of_click(error)
    match error:
        case CommandFailed():
            return str(error), error.exit_code
        case KeyboardInterrupt():
            return "interrupted", FAILED
        case OSError() if error.strerror:
            about = f"{error.filename}: " if error.filename else ""
            if _printed(error):
                flush_output()
                about = "standard output: "
            return f"{about}{error.strerror}; look at it and try again", FAILED
    what = f"unexpected {type(error).__name__}: {error}"
    return f"{what}; a bug in postcopy; 'postcopy --debug ...' shows the traceback", FAILED


def _printed(error: BaseException) -> bool:
    """Whether the error is one of output; such an error names no file."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == click.echo.__module__ for frame, _ in frames)


def _exit_code(error: PostcopyError) -> int:
    match error:
        case NeedsRecovery():
            return NEEDS_RECOVERY
        case Refused():
            return REFUSED
    return FAILED


def _of_click(
    error: click.ClickException | click.exceptions.Exit | click.Abort,
) -> tuple[str, int]:
    match error:
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
            return "", USAGE
        case click.exceptions.Exit():
            return "", error.exit_code
        case click.UsageError():
            return f"{error.format_message().rstrip('.')}; {_where_help_is(error)}", USAGE
        case click.ClickException():
            return error.format_message(), error.exit_code
    return "interrupted", FAILED


def _where_help_is(error: click.UsageError) -> str:
    command = error.ctx.command_path if error.ctx else "postcopy"
    return f"see '{command} --help'"
