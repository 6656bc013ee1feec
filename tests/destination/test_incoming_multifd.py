"""Channels of multifd at a destination: told apart by what they say, and wrong ones refused by name."""

import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fakes.multifd import ChannelWriter, initial
from fakes.waiting import wait_until
from postcopy.channel.address import parse
from postcopy.channel.listen import Listener
from postcopy.destination.incoming_channels import IncomingChannels
from postcopy.errors import ChannelBroken, StreamError
from postcopy.multifd.group import ExpectedChannels, MultifdGroup
from postcopy.stream.encoder import encode_header
from postcopy.stream.layout import BlockLayout

PAGE = 4096
PAGES = 64
LAYOUT = {"ram": BlockLayout(PAGES * PAGE)}


class Memory:
    """Where the pages go."""

    def __init__(self):
        self.rows = np.full((PAGES, PAGE), 7, np.uint8)

    def write(self, pages):
        self.rows[(pages.offsets // PAGE).astype(int)] = pages.data

    def clear(self, zeros):
        self.rows[(zeros.offsets // PAGE).astype(int)] = 0

    def place(self, block, offset, length):
        return self.rows.reshape(-1).data[offset : offset + length]


class Incoming:
    """A destination that waits for two channels of multifd, and for a main channel."""

    def __init__(self, path, *, preempt=False):
        self.path = path
        self.failures = []
        self.group = MultifdGroup(self.failures.append, ExpectedChannels(lambda: 2))
        self.channels = IncomingChannels(Listener(parse(f"unix:{path}")), lambda: preempt)
        self.memory = Memory()
        self._peers = []
        self._pool = ThreadPoolExecutor(1)
        self.waiting = self._pool.submit(self.channels.main_beside, self.group)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.group.close()
        self.channels.close()
        self.channels.close_others()
        self._pool.shutdown()
        if self.waiting.exception() is None:
            self.waiting.result()[0].close()
        for peer in self._peers:
            peer.close()

    def connect(self, data):
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(10)
        peer.connect(str(self.path))
        self._peers.append(peer)
        peer.sendall(data)
        return peer

    def main(self):
        self.connect(encode_header())
        return self.waiting.result(10)

    def failure(self):
        wait_until(lambda: self.failures, 10, "no failure")
        return self.failures[0]


@pytest.fixture
def incoming(tmp_path):
    with Incoming(tmp_path / "m") as made:
        yield made


def rows(seed):
    return np.random.default_rng(seed).integers(1, 256, (PAGES, PAGE), dtype=np.uint8)


def test_any_order_and_the_newer_copy_counts(incoming, capsys):
    stranger = incoming.connect(b"GET ")
    peers = [incoming.connect(initial(number)) for number in (1, 0)]
    _, first = incoming.main()
    assert first == encode_header()[:4]
    incoming.group.wait_for_all(10)
    assert stranger.recv(1) == b""
    assert "Not a migration stream" in capsys.readouterr().err
    old, new = rows(1), rows(2)
    writers = ChannelWriter(), ChannelWriter("zstd")
    peers[0].sendall(writers[0].packet("ram", [(page * PAGE, old[page]) for page in range(40)]))
    peers[1].sendall(writers[1].packet(sync=True) + writers[1].packet(
        "ram", [(page * PAGE, new[page]) for page in range(20, 60)], [60 * PAGE]))  # fmt: skip
    incoming.group.begin(LAYOUT, incoming.memory)
    peers[0].sendall(writers[0].packet(sync=True))
    incoming.group.rendezvous()
    for peer, writer in zip(peers, writers, strict=True):
        peer.sendall(writer.packet(sync=True))
    incoming.group.rendezvous()
    wanted = np.full((PAGES, PAGE), 7, np.uint8)
    wanted[:20], wanted[20:60], wanted[60] = old[:20], new[20:60], 0
    np.testing.assert_array_equal(incoming.memory.rows, wanted)
    assert incoming.failures == []


@pytest.mark.parametrize("pieces", [1, 3, 50])
@pytest.mark.parametrize("synced", ["behind the pages", "with the last pages, as QEMU 7.2 does"])
def test_neighbours_are_received_where_they_belong(incoming, pieces, synced):
    """However the bytes arrive; and a flush does not wait for what comes behind it."""
    peers = [incoming.connect(initial(number)) for number in range(2)]
    incoming.main()
    incoming.group.wait_for_all(10)
    incoming.group.begin(LAYOUT, incoming.memory, incoming.memory.place)
    wanted = np.full((PAGES, PAGE), 7, np.uint8)
    for number, peer in enumerate(peers):
        new, writer, start = rows(number), ChannelWriter(), 32 * number
        at_once = synced.startswith("with")
        raw = writer.packet("ram", [(page * PAGE, new[page]) for page in range(start, start + 20)])
        raw += writer.packet("ram", zeros=[(start + 20) * PAGE])
        last = [(page * PAGE, new[page]) for page in range(start + 21, start + 30)]
        raw += writer.packet("ram", last, sync=at_once)
        raw += b"" if at_once else writer.packet(sync=True)
        for piece in np.array_split(np.frombuffer(raw, np.uint8), pieces):
            peer.sendall(piece.tobytes())
        wanted[start : start + 30] = new[start : start + 30]
        wanted[start + 20] = 0
    incoming.group.rendezvous()
    np.testing.assert_array_equal(incoming.memory.rows, wanted)
    assert incoming.failures == []


@pytest.mark.parametrize("missing", [1, PAGE, 3 * PAGE - 1])
def test_one_ends_in_pages_that_are_received_where_they_belong(incoming, missing):
    peers = [incoming.connect(initial(number)) for number in range(2)]
    incoming.main()
    incoming.group.begin(LAYOUT, incoming.memory, incoming.memory.place)
    packet = ChannelWriter().packet("ram", [(page * PAGE, rows(0)[page]) for page in range(3)])
    peers[0].sendall(packet[:-missing])
    peers[0].shutdown(socket.SHUT_WR)
    assert "multifd channel 0: The channel ends in a packet" in str(incoming.failure())


def test_one_ends_behind_its_pages(incoming):
    peers = [incoming.connect(initial(number)) for number in range(2)]
    incoming.main()
    incoming.group.begin(LAYOUT, incoming.memory, incoming.memory.place)
    peers[0].sendall(ChannelWriter().packet("ram", [(0, rows(0)[0])]))
    peers[0].shutdown(socket.SHUT_WR)
    with pytest.raises(StreamError, match="multifd channel 0 ends before a flush"):
        incoming.group.rendezvous()
    assert incoming.failures == []
    np.testing.assert_array_equal(incoming.memory.rows[0], rows(0)[0])


def test_the_connection_behind_them_is_the_preempt_channel(tmp_path):
    with Incoming(tmp_path / "m", preempt=True) as incoming:
        for number in range(2):
            incoming.connect(initial(number))
        incoming.main()
        incoming.group.wait_for_all(10)
        urgent = incoming.connect(b"")
        with incoming.channels.preempt(10) as preempt:
            urgent.sendall(b"u")
            assert preempt.receive_into(memoryview(bytearray(1))) == 1


@pytest.mark.parametrize(
    ("data", "complaint", "offset"),
    [
        (initial(2), "received channel id 2 is greater than number of channels 2; set multifd-ch", 24),
        (initial(0, bytes(range(16))), "received uuid '00010203-0405-.*' and expected uuid '0000", 8),
        (initial(0)[:4] + b"\0\0\0\2" + initial(0)[8:], "packet version 2 expected version 1", 4),
        (initial(1) + b"nonsense" * 168, "packet magic 6e6f6e73 expected magic 11223344", 64),
    ],
    ids=["one too many", "another machine", "version", "no packet"],
)  # fmt: skip
def test_refused_by_name_and_offset(incoming, data, complaint, offset):
    incoming.connect(data)
    failure = incoming.failure()
    with pytest.raises(StreamError, match=complaint):
        raise failure
    assert failure.offset == offset


def test_two_of_one_number(incoming):
    for _ in range(2):
        incoming.connect(initial(1))
    assert "two channels have the number 1" in str(incoming.failure())


def test_one_is_missing(incoming):
    incoming.connect(initial(1))
    with pytest.raises(StreamError, match=r"opened [01] of 2 channels within 0\.01 s; set multifd"):
        incoming.group.wait_for_all(0.01)


def test_one_ends_before_the_flush(incoming):
    peers = [incoming.connect(initial(number)) for number in range(2)]
    incoming.group.wait_for_all(10)
    incoming.group.begin(LAYOUT, incoming.memory)
    peers[0].sendall(ChannelWriter().packet(sync=True))
    peers[1].shutdown(socket.SHUT_WR)
    with pytest.raises(StreamError, match="multifd channel 1 ends before a flush"):
        incoming.group.rendezvous()


def test_closing_ends_all_waits(incoming):
    peer = incoming.connect(initial(0))
    incoming.connect(b"\x11")  # never says what it is
    wait_until(lambda: incoming.group.count == 1, 10, "it has come")
    incoming.channels.close()
    with pytest.raises(ChannelBroken, match="no longer waiting for a source"):
        incoming.waiting.result(10)
    incoming.group.close()
    incoming.channels.close_others()
    assert peer.recv(1) == b""
