"""Where a snapshot goes to: a Unix socket whose other end reads as slowly as told, or not at all."""

import socket
import threading
import time
from pathlib import Path

from fakes.waiting import wait_until

_PIECE_BYTES = 64 << 10


class Sink:
    """Listens at ``uri``; keeps all that comes in the file ``path``.

    :param bytes_per_second: how fast it reads; 0: as fast as it can.
    """

    def __init__(self, folder: Path, *, bytes_per_second: int = 0) -> None:
        self.uri = f"unix:{folder}/sink"
        self.path = folder / "received"
        self.received_bytes = 0
        self._rate = bytes_per_second
        self._open = threading.Event()
        self._open.set()
        self._slow = threading.Event()
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(f"{folder}/sink")
        self._door.listen(1)
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *_: object) -> None:
        self._slow.set()
        self._rate = 0
        self.flow()
        self.break_off()
        self._thread.join()

    def stall(self) -> "Sink":
        """Read no more."""
        self._open.clear()
        return self

    def flow(self) -> None:
        """Read on."""
        self._open.set()

    def break_off(self) -> None:
        """Hang up."""
        for end in (self._connection, self._door):
            if end is not None:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it has ended before

    def wait_end(self) -> None:
        """Until all has come."""
        wait_until(lambda: not self._thread.is_alive(), 30, "the end of the stream")

    def _run(self) -> None:
        with self._door, self.path.open("wb") as file:
            try:
                self._connection, _ = self._door.accept()
            except OSError:
                return  # nobody came
            with self._connection:
                while data := self._receive():
                    file.write(data)
                    self.received_bytes += len(data)

    def _receive(self) -> bytes:
        began = time.monotonic()
        self._open.wait()
        assert self._connection is not None
        try:
            data = self._connection.recv(_PIECE_BYTES)
        except OSError:
            return b""
        if self._rate:
            self._slow.wait(max(0, len(data) / self._rate - (time.monotonic() - began)))
        return data
