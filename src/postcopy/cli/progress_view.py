"""Shows a migration as it goes: on a terminal, in a log, or to a program."""

import contextlib
import json
import select
import sys
from typing import Any, Final, Protocol, Self

import click

from postcopy.client.progress import Phase, Progress

_MIB = 1 << 20
_PLAIN_EVERY_MS = 1000
_STDOUT: Final = 1


class View(Protocol):
    """Where progress goes; used in ``with``."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""

    def show(self, progress: Progress) -> None:
        """Take one look at the migration."""

    def note(self, text: str) -> None:
        """Say one line."""

    def finish(self, outcome: dict[str, Any]) -> None:
        """Take the end, for programs; people get a report instead."""


def choose(*, as_json: bool) -> View:
    """The view that fits: JSON if asked for, live on a terminal, plain lines elsewhere."""
    if as_json:
        return PatientView(JsonView())
    if sys.stdout.isatty():
        from postcopy.cli.live_view import LiveView

        return PatientView(LiveView())
    return PatientView(PlainView())


class PatientView:
    """Another view, whose output may be slow, or gone: what is watched goes on, and so does the watching.

    A look that finds no room is not shown.  What the command says at its end fails as any output does.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._room = select.poll()
        self._room.register(_STDOUT, select.POLLOUT)

    def __enter__(self) -> Self:
        self._view.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._view.__exit__(*error)

    def show(self, progress: Progress) -> None:
        """Show it if there is room."""
        with contextlib.suppress(OSError):
            if self._room.poll(0):
                self._view.show(progress)

    def note(self, text: str) -> None:
        """Say it if there is anything to say it to."""
        with contextlib.suppress(OSError):
            self._view.note(text)

    def finish(self, outcome: dict[str, Any]) -> None:
        """Say the end."""
        self._view.finish(outcome)


def phase_name(progress: Progress) -> str:
    """Such as ``precopy, round 2``."""
    if progress.phase is Phase.PRECOPY and progress.round:
        return f"{progress.phase.value}, round {progress.round}"
    return progress.phase.value


def figures(progress: Progress) -> str:
    """The figures of one look, in one line; empty before there are any."""
    if not progress.total_bytes:
        return ""
    parts = [
        f"{progress.rate_bytes / _MIB:6.0f} MiB/s",
        f"{progress.remaining_bytes / _MIB:6.0f} MiB remaining",
    ]
    if progress.phase is Phase.PRECOPY:
        parts.append(f"guest writes {progress.dirty_rate_bytes / _MIB:.0f} MiB/s")
    if progress.phase is Phase.POSTCOPY:
        parts.append(f"{progress.faults_per_s} faults/s")
    return ", ".join(parts)


class JsonView:
    """One JSON object a line on stdout."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put back."""

    def show(self, progress: Progress) -> None:
        """Print it with ``event`` = ``progress``."""
        self._print({"event": "progress"} | progress.to_json())

    def note(self, text: str) -> None:
        """Print it with ``event`` = ``note``."""
        self._print({"event": "note", "text": text})

    def finish(self, outcome: dict[str, Any]) -> None:
        """Print it with ``event`` = ``result``."""
        self._print({"event": "result"} | outcome)

    @staticmethod
    def _print(message: dict[str, Any]) -> None:
        click.echo(json.dumps(message))


class PlainView:
    """A line for each phase and round, and one a second between."""

    def __init__(self) -> None:
        self._phase = ""
        self._shown_at_ms = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put back."""

    def show(self, progress: Progress) -> None:
        """Print a line if there is news."""
        phase = phase_name(progress)
        if phase == self._phase and progress.elapsed_ms < self._shown_at_ms + _PLAIN_EVERY_MS:
            return
        self._phase, self._shown_at_ms = phase, progress.elapsed_ms
        seconds = progress.elapsed_ms / 1000
        click.echo(
            f"{seconds:7.2f} s {progress.fraction:4.0%}  {phase:<18}{figures(progress)}".rstrip()
        )

    def note(self, text: str) -> None:
        """Print it."""
        click.echo(text)

    def finish(self, outcome: dict[str, Any]) -> None:
        """Nothing: the report follows."""
