"""What the destination says back, read by the source's own decoder; and what it refuses to be advised."""

import os
import socket
import threading

import pytest

from fakes.guest import RAM, FakeGuest, LocalDestination
from postcopy.channel.address import FdAddress
from postcopy.channel.connect import connect
from postcopy.destination.return_path import ReturnPath
from postcopy.parameters import Capabilities, Capability
from postcopy.status import Status
from postcopy.stream import encoder
from postcopy.stream.commands import encode_command
from postcopy.stream.layout import BlockLayout
from postcopy.stream.pings import IDENTITY_PING, is_ours
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    OpenReturnPath,
    Ping,
    Pong,
    PostcopyAdvise,
    RamSetup,
    RequestPages,
    Shut,
)
from postcopy.stream.return_path import ReturnPathDecoder

SIZE = 4 << 20
ADVISE = PostcopyAdvise(4096, 4096)
POSTCOPY = frozenset({Capability.POSTCOPY_RAM})


def said(received, size_bytes=SIZE):
    decoder = ReturnPathDecoder({RAM: BlockLayout(size_bytes)})
    decoder.feed(received)
    messages = []
    while (message := decoder.next_message()) is not None:
        messages.append(message)
    return messages


class Path:
    """A return path, and the far end of its channel."""

    def __init__(self):
        self.way = ReturnPath()
        self.guest = FakeGuest(SIZE)
        self.ram = self.guest.incoming_ram()
        self.block = self.ram[RAM].block
        self._open()

    def _open(self):
        near, self.far = socket.socketpair()
        self.far.settimeout(10)
        self.channel = connect(FdAddress(near.detach()))
        self.way.open(self.channel)

    def again(self):
        """Another connection in place of this one."""
        self.channel.close()
        self.far.close()
        self._open()

    def close(self):
        self.channel.close()
        self.far.close()
        self.ram.close()
        self.guest.close()


@pytest.fixture
def path():
    made = Path()
    yield made
    made.close()


def test_a_name_is_said_once_a_connection(path):
    path.way.request([(path.block, 1), (path.block, 2)])
    first = path.far.recv(4096)
    path.way.request([(path.block, 3)])
    second = path.far.recv(4096)
    assert first.count(RAM.encode()) == 1
    assert RAM.encode() not in second
    pages = [m for m in said(first + second) if isinstance(m, RequestPages)]
    assert [(m.block, m.start // 4096, m.length_bytes) for m in pages] == [
        (RAM, 1, 4096),
        (RAM, 2, 4096),
        (RAM, 3, 4096),
    ]
    path.again()
    path.way.request([(path.block, 4)])
    assert RAM.encode() in path.far.recv(4096)


def test_nothing_is_said_while_there_is_nobody(path):
    path.way.close()
    assert not path.way.is_open
    path.way.request([(path.block, 1)])
    path.way.pong(1)
    path.way.shut(failed=True)
    path.far.setblocking(False)
    with pytest.raises(BlockingIOError):
        path.far.recv(1)


def test_a_request_on_a_broken_channel_does_not_end_the_pager(path):
    """It is asked for again after the recovery; who asks must live till then."""
    path.far.close()
    for page in range(3):
        path.way.request([(path.block, page)])
    assert not path.way.is_open


def test_messages_of_many_threads_stay_whole(path):
    def ask(number):
        for page in range(50):
            path.way.request([(path.block, number * 50 + page)])
            path.way.pong(number)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    chunks = []
    reader = threading.Thread(target=lambda: chunks.extend(iter(lambda: path.far.recv(4096), b"")))
    reader.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    path.way.shut(failed=False)
    path.channel.shutdown()
    reader.join(10)
    received = b"".join(chunks)
    messages = said(received)
    assert sorted(m.start // 4096 for m in messages if isinstance(m, RequestPages)) == [*range(200)]
    assert sum(isinstance(m, Pong) for m in messages) == 200
    assert messages[-1] == Shut(0)


# --- whole destinations


def feed(*commands, blocks=((RAM, SIZE),), capabilities=POSTCOPY, postcopy=True):
    """Give a destination the head of a stream; return how it failed and what it said."""
    setup = RamSetup(2, tuple(BlockEntry(name, size) for name, size in blocks))
    data = encoder.stream_start(Configuration("microvm"))
    data += b"".join(map(encode_command, commands))
    data += encoder.ram_setup(setup, postcopy=postcopy)
    ours, theirs = socket.socketpair()
    destination = LocalDestination(theirs.detach(), SIZE, Capabilities(frozenset(capabilities)))
    with ours:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        try:
            status = destination.run()
        finally:
            destination.close()
        assert status is Status.FAILED  # at the latest because the stream ends
        assert destination.guest.calls == []
        return str(destination.job.error), said(b"".join(iter(lambda: ours.recv(4096), b"")))


@pytest.mark.userfaultfd
def test_pings_are_answered_in_order_and_the_end_is_told():
    error, told = feed(OpenReturnPath(), Ping(1), Ping(IDENTITY_PING), ADVISE)
    assert told[0] == Pong(1)
    assert is_ours(told[1].value)
    assert told[-1] == Shut(1)
    assert "ends" in error


@pytest.mark.parametrize(
    ("commands", "capabilities", "says"),
    [
        ([ADVISE], (), "RAM postcopy is disabled but have 16 byte advise"),
        ([PostcopyAdvise(None, None)], POSTCOPY, "RAM postcopy is enabled but have 0 byte advise"),
        ([PostcopyAdvise(0x201000, 4096)], POSTCOPY, "matching RAM page sizes (s=201000 d=1000)"),
        ([PostcopyAdvise(4096, 8192)], POSTCOPY, "matching target page sizes (s=8192 d=4096)"),
        ([ADVISE, ADVISE], POSTCOPY, "CMD_POSTCOPY_ADVISE in wrong postcopy state"),
        ([Ping(7)], POSTCOPY, "CMD_PING (0x7) received with no return path"),
    ],
)
@pytest.mark.userfaultfd
def test_what_is_refused(commands, capabilities, says):
    error, _ = feed(*commands, capabilities=capabilities)
    assert says in error


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ([("pc.ram", SIZE)], "pc.ram"),
        ([(RAM, SIZE * 2)], RAM),
        ([], RAM),
        ([("pc.bios", 4096)], f'RAM block "{RAM}" of this side is not in the list'),
    ],
)
def test_other_memory_is_refused_by_name(blocks, says):
    error, _ = feed(blocks=blocks, capabilities=(), postcopy=False)
    assert says in error


def test_no_descriptor_is_left():
    feed(OpenReturnPath(), ADVISE)
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, not paths
    feed(OpenReturnPath(), ADVISE)
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
