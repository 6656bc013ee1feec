"""A QMP client whose events can be waited for and placed on the TSC's time line."""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

Event = dict[str, Any]

_COMMAND_TIMEOUT_S: Final = 120


class QmpFailed(RuntimeError):
    """A command was refused, or the monitor went away; says which and why."""


class Qmp:
    """One connection.  A thread sorts what arrives into answers and events; one caller at a time."""

    def __init__(self, path: Path, still_alive: Callable[[], bool], timeout_s: float = 30) -> None:
        self._socket = _connect(path, still_alive, timeout_s)
        self._lines = self._socket.makefile("r")
        self._lines.readline()  # the greeting
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._arrival = threading.Condition()
        self.events: list[Event] = []
        threading.Thread(target=self._sort, name="qmp", daemon=True).start()
        self.execute("qmp_capabilities")

    def _sort(self) -> None:
        try:
            for line in self._lines:
                message = json.loads(line)
                if "event" not in message:
                    self._answers.put(message)
                    continue
                with self._arrival:
                    self.events.append(message)
                    self._arrival.notify_all()
        except (OSError, ValueError):
            pass  # closed by us or by the other side; the None below says so
        self._answers.put(None)

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; ``_`` in names of arguments stands for ``-``.

        :raises QmpFailed: it was refused, or the other side is gone.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": named}) + "\n"
        try:
            self._socket.sendall(message.encode())
            answer = self._answers.get(timeout=_COMMAND_TIMEOUT_S)
        except (OSError, queue.Empty) as error:
            raise QmpFailed(f"{command}: no answer ({error!r})") from error
        if answer is None:
            raise QmpFailed(f"{command}: the monitor closed the connection")
        if "error" in answer:
            raise QmpFailed(f"{command}: {answer['error'].get('desc')}")
        return answer["return"]

    def hmp(self, line: str) -> str:
        """Run a line of the human monitor."""
        return str(self.execute("human-monitor-command", command_line=line)).strip()

    def find_event(self, name: str, status: str | None = None) -> Event | None:
        """The first event of that name (and, for MIGRATION, status) so far."""
        for event in tuple(self.events):
            if event["event"] == name and status in (None, event.get("data", {}).get("status")):
                return event
        return None

    def wait_event(self, name: str, status: str | None = None, timeout_s: float = 30) -> Event:
        """The first such event, past or future.

        :raises TimeoutError: it did not come.
        """
        end = time.monotonic() + timeout_s
        with self._arrival:
            while (event := self.find_event(name, status)) is None:
                left_s = end - time.monotonic()
                if left_s <= 0 or not self._arrival.wait(left_s):
                    names = [event["event"] for event in self.events]
                    raise TimeoutError(f"no event {name} {status or ''}; there were {names}")
        return event

    def close(self) -> None:
        """Close the connection, which ends the thread too."""
        self._socket.close()


def _connect(path: Path, still_alive: Callable[[], bool], timeout_s: float) -> socket.socket:
    end = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            if not still_alive() or time.monotonic() > end:
                raise QmpFailed(f"no monitor at {path}: {error}") from error
            time.sleep(0.002)
        else:
            return connection
