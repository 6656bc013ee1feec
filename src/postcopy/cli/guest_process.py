"""The process of a guest: starts and ends machine, migration and monitors."""

import contextlib
import gc
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from postcopy.cli import tls
from postcopy.cli.failures import DONE, FAILED
from postcopy.cli.process import notice
from postcopy.cli.run_settings import DEFER, NONE, STDIO, RunSettings
from postcopy.errors import ImageError, Refused
from postcopy.events import EventBus
from postcopy.image.file_kinds import check_no_image
from postcopy.kernel import threads
from postcopy.link.guest.control import MigrationControl
from postcopy.link.guest.engine_slot import EnginePool
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.run_control import RunState
from postcopy.machine.serial_output import SerialOutput
from postcopy.machine.vcpu import install_kick_handler
from postcopy.restore_options import RestoreOptions
from postcopy.stacks import tell_when_asked
from postcopy.status import Status

if TYPE_CHECKING:
    from postcopy.monitor.controls import Backend
    from postcopy.monitor.hmp_console import HmpConsole

_SWITCH_INTERVAL_S: Final = 0.0001
"""How long one thread may keep the others from running: one of them may be a vCPU that starts."""

_CLOSE_S: Final = 2.0
_STDOUT: Final = 1


class _OperatedMachine(Machine):
    """A machine whose monitors can end its process."""

    def __init__(self, config: MachineConfig, process: "GuestProcess") -> None:
        super().__init__(config, on_event=process.tell, on_serial=process.serial_output())
        self._process = process

    def quit(self) -> None:
        """Request the end of the process; returns at once, so that the answer can be sent."""
        self._process.end(DONE)


class GuestProcess:
    """One guest's process from its command line to its exit code.

    The main thread reads a pipe; any thread may end that wait by :meth:`end`.  A pipe and not a lock,
    because the kernel may deliver a signal to a vCPU's thread: then only the pipe ends the wait.

    :param engines: with one that has been forked already.
    """

    def __init__(self, settings: RunSettings, engines: EnginePool | None = None) -> None:
        self.events = EventBus()
        self._settings = settings
        self._engines = engines
        self._over = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._exit_code = DONE
        self._cleanup = contextlib.ExitStack()
        self._failure: BaseException | None = None

    def run(self) -> int:
        """Serve until :meth:`end`.

        Exits the process in place of a return, since threads may wait in calls that never return, such as
        the console on standard input.

        :return: the exit code.
        """
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._name_process()
        tell_when_asked()
        install_kick_handler()
        self._catch_signals()
        # In another thread: it may wait for an image, a name server or an engine.
        starting = threading.Thread(target=self._start_or_fail, name="start", daemon=True)
        threads.start(starting)
        while not self._over:
            os.read(self._wake_reader, 1)
        self._cleanup.close()
        starting.join(_CLOSE_S)  # its wait has failed by now
        self._cleanup.close()
        if self._failure is not None:
            raise self._failure
        _try(_flush)
        os._exit(self._exit_code)

    def end(self, exit_code: int) -> None:
        """Request the end of the process, with the first exit code that is not 0."""
        self._exit_code = self._exit_code or exit_code
        self._over = True
        with contextlib.suppress(BlockingIOError):  # full: the main thread reads it anyway
            os.write(self._wake_writer, b"\0")

    def tell(self, name: str, data: Mapping[str, Any]) -> None:
        """Emit an event of the machine to all monitors."""
        self.events.emit(name, data)

    def serial_output(self) -> Callable[[bytes], None]:
        """Return the function that writes the guest's serial output."""
        return _serial_output(self._settings.serial, self._cleanup)

    def _start_or_fail(self) -> None:
        try:
            self._start()
        except BaseException as failure:
            if not self._over:  # else it has failed because the process ends
                self._failure = failure
                self.end(FAILED)

    def _start(self) -> None:
        settings = self._settings
        incoming = settings.incoming is not None or settings.restore is not None
        machine = _OperatedMachine(settings.machine, self)
        self._cleanup.callback(_try, machine.close)
        control = MigrationControl(
            machine,
            self.events,
            incoming=incoming,
            on_moved=lambda: machine.set_run_state(RunState.POSTMIGRATE),
            on_incoming_failed=self._incoming_failed,
            engines=self._engines,
        )
        self._cleanup.callback(control.kill_engines)
        self._cleanup.callback(_try, control.close)
        if settings.restore is None:
            tls.set_up(control, settings)
        machine.start(paused=settings.paused, incoming=incoming)
        if settings.restore is not None:
            self._restore(control, settings.restore)
        elif incoming:
            control.prepare()
        else:
            thread = threading.Thread(target=control.prepare, name="prepare", daemon=True)
            threads.start_if_possible(thread)  # else an engine is started when it is needed
        from postcopy.monitor.controls import (
            Backend,
        )  # imported late: the guest of a restore runs first

        backend = Backend(machine, control, self.events)
        if settings.incoming not in {None, DEFER}:
            control.incoming(
                str(settings.incoming)
            )  # before QMP: a client of QMP finds the listener
        self._serve(backend)
        if STDIO in settings.monitors:
            self._open_console(backend)
        gc.freeze()  # what the start has made lives as long as the process

    def _restore(self, control: MigrationControl, options: RestoreOptions) -> None:
        try:
            control.restore(options)
        except ImageError as error:
            raise Refused(str(error)) from error
        told = threading.Thread(target=_tell_times, args=(control,), name="times", daemon=True)
        threads.start_if_possible(told)

    def _serve(self, backend: "Backend") -> None:
        from postcopy.monitor.server import serve_hmp, serve_qmp

        if self._settings.metrics:  # before QMP: a client of QMP finds these
            self._serve_metrics(backend)
        for address in self._settings.qmps:
            self._cleanup.callback(_try, serve_qmp(address, backend).close)
        for address in self._settings.monitors:
            if address != STDIO:
                self._cleanup.callback(_try, serve_hmp(address, backend).close)

    def _serve_metrics(self, backend: "Backend") -> None:
        from postcopy.monitor.scrape import serve_metrics  # its library takes a third of a second

        for address in self._settings.metrics:
            server = serve_metrics(address, backend)
            self._cleanup.callback(_try, server.close)
            if server.address != address:  # such as a port that the kernel has chosen
                notice(f"metrics are served at {server.address}")

    def _open_console(self, backend: "Backend") -> None:
        """Start a thread for the console: the main thread must handle signals."""
        from postcopy.monitor.hmp_console import HmpConsole

        self._cleanup.callback(_terminal_restorer())
        console = HmpConsole(backend, sys.stdin, sys.stdout)
        threads.start(
            threading.Thread(target=self._converse, args=(console,), name="console", daemon=True)
        )

    def _converse(self, console: "HmpConsole") -> None:
        try:
            console.run()
        finally:
            self.end(DONE)

    def _incoming_failed(self, reason: str) -> None:
        what = "incoming migration" if self._settings.restore is None else "restore"
        notice(f"the {what} failed: {reason}")
        self.end(FAILED)

    def _catch_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._terminate)

    def _terminate(self, number: int, _frame: object) -> None:
        if not self._over:
            notice(f"terminating on signal {number}")
        self.end(DONE)

    def _name_process(self) -> None:
        if self._settings.name:
            Path("/proc/self/comm").write_bytes(os.fsencode(self._settings.name))


def _tell_times(control: MigrationControl) -> None:
    """Print the times of the restore when it has ended."""
    control.progress.wait(Status.COMPLETED, Status.FAILED)
    info = control.info()
    if info.error_desc is not None:
        notice(info.error_desc)
    times = info.measured
    if times is None or times.restore_complete_us is None:
        return
    spans = (times.restore_running_us, times.restore_ready_us, times.restore_complete_us)
    names = ("running", "ready", "complete")
    parts = [f"{name} after {us / 1e6:.3f} s" for name, us in zip(names, spans, strict=True) if us]
    notice(f"{', '.join(parts)}; {times.demand_faults} demand faults")


def _serial_output(place: str, cleanup: contextlib.ExitStack) -> Callable[[bytes], None]:
    """Return the function that writes the guest's serial output.

    :param place: ``stdio``, ``none`` or ``file:PATH``.
    :param cleanup: flushes the output, and reports lost bytes.
    :raises OSError: the file cannot be opened.
    :raises Refused: it belongs to an image.
    """
    if place == NONE:
        return lambda _data: None
    fd, name = _STDOUT, "standard output"
    if place != STDIO:
        name = place.removeprefix("file:")
        check_no_image(Path(name))
        # Never closed: a blocked write may be under way until the process ends.
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def tell(reason: str) -> None:
        notice(f"{name}: {reason}; the guest goes on, and its serial output is lost meanwhile")

    output = SerialOutput(fd, tell)

    def close() -> None:
        output.close()
        if output.dropped_bytes:
            notice(f"{name}: {output.dropped_bytes} bytes of the guest's serial output were lost")

    cleanup.callback(close)
    return output.write


def _terminal_restorer() -> Callable[[], None]:
    """Return a function that restores the present mode of the terminal.

    The console's thread may be reading a line, in raw mode, when the process exits.
    """
    if not sys.stdin.isatty():
        return lambda: None
    settings = termios.tcgetattr(sys.stdin)
    return lambda: termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):  # closed, or a full disk: the output is lost
        sys.stdout.flush()


def _try(close: Callable[[], None]) -> None:
    """Call ``close``, and return after :data:`_CLOSE_S` at the latest.

    A vCPU that waits for a page may be unstoppable (Linux 6.18), and standard output may be a blocked pipe.
    """
    thread = threading.Thread(target=close, name="close", daemon=True)
    if threads.start_if_possible(thread):
        thread.join(_CLOSE_S)
