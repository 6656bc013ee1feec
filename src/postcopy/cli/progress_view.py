"""Shows the progress and the result of a migration: on a terminal, in a log, or to a program."""

import contextlib
import json
import select
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Self

import click

from postcopy.client.progress import Phase, Progress

if TYPE_CHECKING:
    from postcopy.client.result import Result

_MIB = 1 << 20
_PLAIN_EVERY_MS = 1000
_STDOUT: Final = 1
_COLOURS = {
    Phase.PRECOPY: "cyan",
    Phase.SWITCHOVER: "yellow",
    Phase.POSTCOPY: "magenta",
    Phase.PAUSED: "red",
    Phase.SAVING: "cyan",
    Phase.DIGESTS: "yellow",
    Phase.RECOVERY: "yellow",
    Phase.COMPLETED: "green",
    Phase.FAILING: "red",
    Phase.FAILED: "red",
}


class View(ABC):
    """Shows progress; used in ``with``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - most have nothing to restore
        """Restore the terminal."""

    @abstractmethod
    def show(self, progress: Progress) -> None:
        """Show one progress."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Show one line."""

    def finish(self, outcome: dict[str, Any]) -> None:  # noqa: B027 - for a user a report follows
        """Show the result, for programs."""


def choose(*, as_json: bool) -> View:
    """Return a view: JSON if requested, live on a terminal, plain lines elsewhere."""
    if as_json:
        return PatientView(JsonView())
    if sys.stdout.isatty():
        return PatientView(LiveView())
    return PatientView(PlainView())


class PatientView(View):
    """Wraps a view whose output may block or be closed, so that the command goes on.

    A progress for which the output has no room is not shown.  At the end of a command output errors are
    reported.
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
        """Show it if the output has room."""
        with contextlib.suppress(OSError):
            if self._room.poll(0):
                self._view.show(progress)

    def note(self, text: str) -> None:
        """Show it unless the output is closed."""
        with contextlib.suppress(OSError):
            self._view.note(text)

    def finish(self, outcome: dict[str, Any]) -> None:
        """Show the result."""
        self._view.finish(outcome)


def phase_name(progress: Progress) -> str:
    """Such as ``precopy, round 2``."""
    if progress.phase is Phase.PRECOPY and progress.round:
        return f"{progress.phase.value}, round {progress.round}"
    return progress.phase.value


def figures(progress: Progress) -> str:
    """The figures of one progress, in one line; empty before there are any."""
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


class JsonView(View):
    """One JSON object a line on stdout."""

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


class PlainView(View):
    """A line for each phase and round, and one a second."""

    def __init__(self) -> None:
        self._phase = ""
        self._shown_at_ms = 0

    def show(self, progress: Progress) -> None:
        """Print a line if it is a new phase, or a second has passed."""
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


class LiveView(View):
    """A moving bar with phase and figures, and above it a line for each phase and round that is over."""

    def __init__(self) -> None:
        # Imported here: rich takes long, and only a terminal needs it.
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=Console(),
        )
        self._task = self._bars.add_task("setup", total=1.0, figures="")
        self._last: Progress | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Move the bar; print a line when a phase or round is over."""
        last, self._last = self._last, progress
        if last is not None and phase_name(last) != phase_name(progress):
            self._bars.console.print(
                f"[dim]{last.elapsed_ms / 1000:7.2f} s  {phase_name(last):<18}{figures(last)}[/dim]",
                highlight=False,
            )
        colour = _COLOURS.get(progress.phase, "white")
        self._bars.update(
            self._task,
            completed=progress.fraction,
            description=f"[{colour}]{phase_name(progress):<17}[/]",
            figures=figures(progress),
        )

    def note(self, text: str) -> None:
        """Print it above the bar."""
        self._bars.console.print(text, highlight=False, markup=False)


def result_rows(result: "Result") -> Iterator[tuple[str, str]]:
    """The figures of a completed migration, for a user."""
    yield "total time", f"{result.total_ms / 1000:.2f} s"
    yield "downtime, by the source", f"{result.downtime_ms:.1f} ms"
    yield "precopy rounds", str(result.rounds)
    yield (
        "sent",
        f"{result.transferred_bytes / _MIB:.0f} MiB: {result.precopy_bytes / _MIB:.0f} precopy, "
        f"{result.postcopy_bytes / _MIB:.0f} postcopy",
    )
    yield (
        "pages",
        f"{result.normal_pages} with data, {result.zero_pages} zero, "
        f"{result.requested_pages} asked for by the destination",
    )
    if not result.postcopy_bytes:
        return
    latency = result.fault_latency
    if latency is not None:
        ms = [f"{us / 1000:.2f}" for us in (latency.p50_us, latency.p99_us, latency.max_us)]
        yield "page-fault latency", f"p50 {ms[0]} ms, p99 {ms[1]} ms, max {ms[2]} ms"
    for vcpu, blocked_ms in enumerate(result.blocktime_ms):
        yield f"blocktime of vCPU {vcpu}", f"{blocked_ms:.1f} ms"
    if result.overlapped_blocktime_ms is not None:
        yield "blocktime of all at once", f"{result.overlapped_blocktime_ms:.1f} ms"


def as_table(rows: list[tuple[str, str]]) -> str:
    """Format rows as one aligned block."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
