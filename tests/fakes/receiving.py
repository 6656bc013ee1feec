"""A receiver of an image in this process, its source's streams recorded, and sent again."""

import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from fakes.real_qemu import QemuProcess
from postcopy.channel.address import bound_uri, parse
from postcopy.channel.listen import Listener
from postcopy.image.options import ImageOptions
from postcopy.receive.receiver import ReceivedImage, Receiver

TIMEOUT_S = 30.0


class Receiving:
    """A receiver that waits for a source, in a thread."""

    def __init__(self, uri: str, image: Path, wanted: ImageOptions | None = None) -> None:
        self.notes: list[str] = []
        self._listener = Listener(parse(uri))
        self.uri = bound_uri(uri, self._listener.described())
        self.receiver = Receiver(self._listener, image, self.notes.append, wanted)
        self._image: ReceivedImage | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="receiver")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.receiver.cancel()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._image = self.receiver.run()
        except BaseException as error:
            self._error = error

    def result(self) -> ReceivedImage:
        """What it has received, or its error."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the receiver has not ended"
        if self._error is not None:
            raise self._error
        assert self._image is not None
        return self._image


def recorded(qemu: QemuProcess, folder: Path) -> list[bytes]:
    """What a QEMU without ``return-path`` sends, connection by connection, the main channel first."""
    path = folder / "recorder"
    streams: list[bytes] = []
    threads: list[threading.Thread] = []

    def record(connected: socket.socket) -> None:
        with connected, connected.makefile("rb") as stream:
            streams.append(stream.read())

    def accept() -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=record, args=(connected,)))
            threads[-1].start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(32)
        accepting = threading.Thread(target=accept)
        accepting.start()
        qemu("migrate", uri=f"unix:{path}")
        qemu.wait_migration("completed")
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for thread in threads:
            thread.join()
    path.unlink()
    return sorted(streams, key=lambda stream: not stream.startswith(b"QEVM"))


def send(streams: Sequence[bytes], uri: str) -> None:
    """Send recorded streams to a receiver on a Unix socket; a receiver may break them off."""
    threads = []
    for stream in streams:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(uri.removeprefix("unix:"))
        except OSError:  # it has refused another already
            connected.close()
            continue
        threads.append(threading.Thread(target=_send, args=(connected, stream)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def _send(connected: socket.socket, stream: bytes) -> None:
    with connected:
        try:
            connected.sendall(stream)
            connected.shutdown(socket.SHUT_WR)
            while connected.recv(4096):
                pass
        except OSError:
            pass  # broken off
