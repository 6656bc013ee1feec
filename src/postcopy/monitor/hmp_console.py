"""HMP for a person: a prompt on a terminal, a pipe, or a socket."""

import contextlib
import socket
import sys
from typing import TextIO

from postcopy.monitor import version
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp import Hmp, completions

PROMPT = "(postcopy) "


class HmpConsole:
    """Reads commands from ``stdin`` and prints to ``stdout`` until EOF or ``quit``.

    On the process's own terminal lines can be edited, recalled and completed.
    """

    def __init__(self, backend: Backend, stdin: TextIO, stdout: TextIO) -> None:
        self._hmp = Hmp(backend, interactive=True)
        self._stdin = stdin
        self._stdout = stdout
        self._is_ours = stdin is sys.stdin
        self._editing = stdin is sys.stdin and stdin.isatty() and stdout.isatty()

    def run(self) -> None:
        """Serve until there is no more input; the caller's thread is the console's."""
        self._print(f"{version.package()} monitor - type 'help' for more information\n")
        if self._editing:
            _complete_commands()
        with contextlib.suppress(BrokenPipeError, ConnectionError, KeyboardInterrupt):
            while (line := self._ask()) is not None:
                self._print(self._hmp.run(line))
                if line.strip() in {"quit", "q"}:
                    return

    def _ask(self) -> str | None:
        if self._editing:
            try:
                return input(PROMPT)
            except EOFError:
                self._print("\n")
                return None
        self._print(PROMPT)
        line = self._stdin.readline(65536)
        return line or None

    def _print(self, text: str) -> None:
        try:
            self._stdout.write(text)
            self._stdout.flush()
        except OSError:
            # The guest ends with the console; a failure to print is no reason for that.
            if not self._is_ours:
                raise


def _complete_commands() -> None:
    try:
        import readline
    except ImportError:  # a Python that was built without it: lines cannot be edited
        return

    def complete(text: str, state: int) -> str | None:
        found = completions(text)
        return found[state] if state < len(found) else None

    readline.set_completer_delims("")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


class HmpSession:
    """Serves one HMP client on a connected socket, which it owns from here on."""

    def __init__(self, connection: socket.socket, backend: Backend) -> None:
        self._connection = connection
        self._backend = backend

    def run(self) -> None:
        """Serve until the client goes or :meth:`close` is called."""
        try:
            with (
                self._connection,
                self._connection.makefile("r", errors="replace") as stdin,
                self._connection.makefile("w", newline="\r\n") as stdout,
            ):
                HmpConsole(self._backend, stdin, stdout).run()
        except OSError:
            return  # the client is gone

    def close(self) -> None:
        """End; any thread may call it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
