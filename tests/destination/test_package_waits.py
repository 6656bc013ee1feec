"""A device that is being loaded waits for a page, and the source is gone: nobody waits for ever."""

import contextlib
import socket
import threading

import pytest

from fakes.guest import RAM, FakeGuest, LocalDestination, need_missing_pages
from fakes.waiting import wait_until
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.status import Status
from postcopy.stream import encoder
from postcopy.stream.commands import encode_command
from postcopy.stream.layout import BlockLayout
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    OpenReturnPath,
    Package,
    Ping,
    Pong,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamSetup,
    RequestPages,
    Shut,
)
from postcopy.stream.return_path import ReturnPathDecoder

SIZE = 1 << 20
NEEDED = 5


class Needy(FakeGuest):
    """A device of its reads guest memory when it is loaded."""

    def load_devices(self, states):
        self.calls.append("load")
        self.touch(NEEDED)


def stream_with_package():
    parts = [PostcopyListen(), Ping(3), PostcopyRun()]
    package = Package(b"".join(encode_command(part) for part in parts))
    greeting = [OpenReturnPath(), PostcopyAdvise(4096, 4096)]
    setup = RamSetup(2, (BlockEntry(RAM, SIZE),))
    return (
        encoder.stream_start(Configuration("microvm"))
        + b"".join(map(encode_command, greeting))
        + encoder.ram_setup(setup, postcopy=True)
        + encode_command(package)
    )


class Source:
    """The far end, which brings no page, and a destination on a thread of its own."""

    def __init__(self, timeout_ms):
        self.end, theirs = socket.socketpair()
        self.end.settimeout(10)
        self.decoder = ReturnPathDecoder({RAM: BlockLayout(SIZE)})
        self.destination = LocalDestination(
            theirs.detach(),
            SIZE,
            Capabilities(frozenset({Capability.POSTCOPY_RAM})),
            parameters=Parameters(x_link_timeout=timeout_ms),
            guest=Needy,
        )
        self.thread = threading.Thread(target=self.destination.run, daemon=True)

    def begin(self):
        self.thread.start()
        self.end.sendall(stream_with_package())

    def hear(self, kind):
        """The next message of that kind."""
        while not isinstance(message := self.decoder.next_message(), kind):
            if message is None:
                data = self.end.recv(4096)
                assert data, f"the end comes before a {kind.__name__}"
                self.decoder.feed(data)
        return message

    def check_failed(self):
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.destination.statuses[-1] is Status.FAILED
        assert Status.POSTCOPY_ACTIVE not in self.destination.statuses

    def close(self):
        self.end.close()
        guest, package = self.destination.guest, self.destination.job._postcopy._package_thread
        guest.unwatch_missing()  # as the guest's process does when it has failed
        if package is not None:
            package.join(10)
            assert not package.is_alive()
        assert "resume" not in guest.calls
        self.destination.close()


@pytest.fixture
def source():
    need_missing_pages()
    with contextlib.ExitStack() as stack:

        def make(timeout_ms=0):
            made = Source(timeout_ms)
            stack.callback(made.close)
            made.begin()
            assert made.hear(RequestPages).start == NEEDED * 4096
            return made

        yield make


def test_an_end_of_the_source_is_the_end_of_the_migration(source):
    """And the source is told so: the guest goes on there."""
    peer = source()
    peer.end.shutdown(socket.SHUT_WR)
    assert peer.hear(Shut) == Shut(1)
    peer.check_failed()


def test_so_is_its_silence(source):
    peer = source(timeout_ms=200)
    peer.check_failed()
    assert "nothing came from the source for 0.2 s" in str(peer.destination.job.error)


def test_so_it_is_when_the_user_says_so(source):
    peer = source()
    peer.destination.job.pause()
    peer.check_failed()


def test_a_page_that_comes_in_time_lets_the_guest_run(source):
    peer = source()
    peer.destination.guest.unwatch_missing()  # the load goes on
    assert peer.hear(Pong) == Pong(3)
    wait_until(lambda: "resume" in peer.destination.guest.calls, 10, "the guest runs")
    peer.end.shutdown(socket.SHUT_WR)
    peer.thread.join(10)
    assert peer.destination.statuses[-1] is Status.POSTCOPY_PAUSED
    peer.destination.guest.calls.clear()
