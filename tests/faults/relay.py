"""A relay between two peers that can do to a connection what networks do.

It listens on a Unix or TCP address and passes each connection on to another.  All bytes are
recorded; on top of that it can cut a connection at an exact byte, stall, delay, or close::

    with Relay("tcp:127.0.0.1:0", target_uri) as relay:
        relay.cut_after(70_000)            # towards the target, on connection 0
        migrate(to=relay.uri)
        relay.wait_for_cut(10)
        relay.stall(); relay.flow()

"Up" is from who connected towards the target (the stream), "down" is back (the return path).
"""

import contextlib
import enum
import socket
import threading
import time

from fakes.waiting import wait_until
from postcopy.channel.address import TcpAddress, UnixAddress, parse
from postcopy.channel.listen import BACKLOG

CHUNK_BYTES = 16384


class Way(enum.Enum):
    """From who connected towards the target, or back."""

    UP = "up"
    DOWN = "down"


class Connection:
    """One connection that was passed on: what went over it, and the two sockets."""

    def __init__(self, client, server):
        self.client = client
        self.server = server
        self.recorded = {way: bytearray() for way in Way}
        self.cut = threading.Event()
        self.ways_open = len(Way)
        self._lock = threading.Lock()

    def ends(self, way):
        return (self.client, self.server) if way is Way.UP else (self.server, self.client)

    def end_of_way(self):
        """Nothing more goes one way; after the second, let go of the sockets.

        Shutting down alone is not enough on TCP: a peer that goes on sending would fill the
        buffers and wait, where a socket that is gone makes it fail.
        """
        with self._lock:
            self.ways_open -= 1
            if self.ways_open == 0:
                self.client.close()
                self.server.close()

    def close(self):
        """Break both sides, at once: what is on its way is lost."""
        self.cut.set()
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Relay:
    """Runs until ``close``; every fault can be set before or while bytes flow.

    :param listen: where to be connected to, as a URI; port 0 lets the kernel choose.
    :param target: where to pass connections on to, as a URI; may be changed later.
    """

    def __init__(self, listen, target):
        self.target = target
        self.connections = []
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._cuts = {}
        self._delay_s = 0.0
        self._closed = threading.Event()
        self._threads = []
        self._door = _listen(parse(listen))
        name = self._door.getsockname()
        self.uri = f"unix:{name}" if isinstance(name, str) else str(TcpAddress(*name[:2]))
        self._start(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def cut_after(self, n_bytes, way=Way.UP, connection=0):
        """Break that connection (by its number) when so many bytes have gone that way."""
        with self._lock:
            self._cuts[connection, way] = n_bytes

    def stall(self):
        """Hold back every byte, both ways, and leave all connections open."""
        self._flowing.clear()

    def flow(self):
        """Go on after ``stall``."""
        self._flowing.set()

    def delay(self, seconds):
        """Hold back each chunk for so long: a slow network, not a broken one."""
        self._delay_s = seconds

    def break_all(self):
        """Break every connection that is open; new ones are passed on."""
        with self._lock:
            for connection in self.connections:
                connection.close()

    def wait_for_cut(self, timeout_s=10.0, connection=0):
        """Wait until that connection is broken."""
        wait_until(
            lambda: (
                len(self.connections) > connection and self.connections[connection].cut.is_set()
            ),
            timeout_s,
            f"the cut of connection {connection}",
        )

    def recorded(self, way=Way.UP, connection=0):
        """What has gone that way so far."""
        return bytes(self.connections[connection].recorded[way])

    def close(self):
        """Stop listening, break everything, and wait for the threads."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self.break_all()
        self._flowing.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} of the relay hangs"
        self._door.close()

    def _start(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments, name=work.__name__, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while not self._closed.is_set():
            try:
                client, _ = self._door.accept()
            except OSError:
                return  # closed
            server = _connect(parse(self.target), self._closed)
            if server is None:
                client.close()
                continue
            connection = Connection(client, server)
            with self._lock:
                number = len(self.connections)
                self.connections.append(connection)
                if self._closed.is_set():
                    connection.close()
            for way in Way:
                self._start(self._pass_on, connection, number, way)

    def _pass_on(self, connection, number, way):
        origin, target = connection.ends(way)
        try:
            while chunk := origin.recv(CHUNK_BYTES):
                self._hold_back(number, way)
                for piece in self._treat(connection, number, way, chunk):
                    # Recorded first: who has received a byte finds it in the record.
                    connection.recorded[way] += piece
                    target.sendall(piece)
                if connection.cut.is_set():
                    return
            if self._passes_ends(connection):
                target.shutdown(socket.SHUT_WR)  # an end, not a break: the other way stays open
        except OSError:
            if self._passes_ends(connection):
                connection.close()  # one side broke, so the other has to see it
        finally:
            connection.end_of_way()

    def _passes_ends(self, _connection):
        """Whether one side gets to know that the other has ended."""
        return True

    def _treat(self, connection, number, way, chunk):
        """What of a chunk is passed on, piece by piece; it may break the connection behind one."""
        yield chunk[: self._allowed(connection, number, way, len(chunk))]
        if self._allowed(connection, number, way, 1) == 0:
            connection.close()

    def _hold_back(self, _number, _way):
        if self._delay_s:
            self._closed.wait(self._delay_s)
        self._flowing.wait()

    def _allowed(self, connection, number, way, wanted):
        with self._lock:
            cut_at = self._cuts.get((number, way))
        if cut_at is None:
            return wanted
        return max(0, min(wanted, cut_at - len(connection.recorded[way])))


def _listen(address):
    if isinstance(address, UnixAddress):
        door = socket.socket(socket.AF_UNIX)
        door.bind(address.path)
        door.listen(BACKLOG)
        return door
    assert isinstance(address, TcpAddress)
    return socket.create_server((address.host, address.port), backlog=BACKLOG)


def _connect(address, closed, timeout_s=10.0):
    """The target, as soon as it listens; None when it never does, or the relay is closed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not closed.is_set():
        family = socket.AF_UNIX if isinstance(address, UnixAddress) else socket.AF_INET
        target = socket.socket(family)
        try:
            where = address.path if family == socket.AF_UNIX else (address.host, address.port)
            target.connect(where)
            return target
        except (ConnectionRefusedError, FileNotFoundError):
            target.close()
            closed.wait(0.02)
    return None
