"""Pieces that lie in many places go out as one, however little the kernel takes at a time."""

import ctypes
import mmap
import os
import socket
import struct
import threading
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.waiting import wait_until
from postcopy.channel import writev
from postcopy.channel.address import FdAddress, FileAddress, TcpAddress
from postcopy.channel.connect import connect
from postcopy.channel.listen import Listener
from postcopy.channel.writev import PendingPieces
from postcopy.errors import ChannelBroken

WORD, PAGE = 8, 64


class Scattered:
    """Pieces in memory, with room between them, and what they are one behind the other."""

    def __init__(self, lengths):
        random = np.random.default_rng(len(lengths))
        self.memory = random.integers(0, 256, sum(lengths) + 3 * len(lengths) + 1, dtype=np.uint8)
        starts = np.cumsum([0, *(length + 3 for length in lengths)])[:-1]
        self.table = np.stack((starts + self.memory.ctypes.data, lengths), 1).astype(np.uint64)
        rows = zip(starts.tolist(), lengths, strict=True)
        self.bytes = b"".join(self.memory[at : at + length].tobytes() for at, length in rows)


class Taker:
    """A kernel that takes so many bytes at each call, and reads them where it is told."""

    def __init__(self, *shares):
        self.taken = b""
        self.positions = []
        self._shares = list(shares)

    def __call__(self, _fd, address, count, position=None):
        assert count <= 1024
        pieces = np.ctypeslib.as_array((ctypes.c_uint64 * (2 * count)).from_address(address))
        offered = b"".join(ctypes.string_at(at, n) for at, n in pieces.reshape(-1, 2).tolist())
        share = self._shares.pop(0) if self._shares else len(offered)
        self.taken += offered[:share]
        self.positions.append(position)
        return min(share, len(offered))


@pytest.mark.parametrize("cut", range(3 * (WORD + PAGE) + 1))
def test_it_goes_on_where_the_kernel_stopped(cut):
    pieces = Scattered([WORD, PAGE] * 3)
    before = pieces.table.copy()
    left, taker = PendingPieces(pieces.table), Taker(cut)
    with mock.patch.object(writev, "write_pieces", taker):
        while left:
            left.write(3)
    assert taker.taken == pieces.bytes
    assert (pieces.table == before).all()  # the caller's is as it was


@given(
    st.lists(st.integers(0, 5), max_size=40),
    st.lists(st.integers(0, 12), max_size=30),
    st.integers(1, 8),
)
def test_any_pieces_in_any_shares(lengths, shares, limit):
    pieces = Scattered(lengths)
    left, taker = PendingPieces(pieces.table), Taker(*shares)
    with mock.patch.multiple(writev, write_pieces=taker, IOV_MAX=limit):
        position = 100
        while left:
            position += left.write_at(3, position)
    assert taker.taken == pieces.bytes
    assert position == 100 + len(pieces.bytes)


def opened(kind, folder):
    """A channel to send on, and where what was sent can be read; of a file, nowhere yet."""
    if kind == "file":
        return connect(FileAddress(str(folder / "file"), 5)), None
    if kind == "pipe":
        reading, writing = os.pipe()
    elif kind == "unix":
        reading, writing = (end.detach() for end in socket.socketpair())
    else:
        with socket.create_server(("127.0.0.1", 0)) as door:
            writing = socket.create_connection(door.getsockname()).detach()
            reading = door.accept()[0].detach()
    return connect(FdAddress(writing)), os.fdopen(reading, "rb")


@pytest.mark.parametrize("kind", ["tcp", "unix", "pipe", "file"])
@pytest.mark.parametrize("count", [0, 1, 1024, 1025, 3001])
def test_over_every_kind_of_channel(kind, count, tmp_path):
    pieces = Scattered([n % 1300 for n in range(1, count + 1)])
    channel, reader = opened(kind, tmp_path)
    found = []
    thread = threading.Thread(target=lambda: found.append(reader.read()))
    if reader is not None:
        thread.start()
    channel.bound_buffers(8192)
    channel.send(b"before")
    channel.send_gathered(pieces.table)
    channel.send(b"after")
    assert channel.sent_bytes == len(pieces.bytes) + 11
    channel.close()
    if reader is None:
        found.append((tmp_path / "file").read_bytes()[5:])
    else:
        thread.join(10)
        reader.close()
    assert found == [b"before" + pieces.bytes + b"after"]


def test_a_peer_that_is_gone_is_named():
    pieces = Scattered([1000] * 2000)
    with Listener(TcpAddress("127.0.0.1", 0)) as listener:
        near = connect(listener.addresses[0])
        with listener.accept(10) as far, socket.socket(fileno=os.dup(far.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def send_until_refused():
        while True:
            near.send_gathered(pieces.table)

    with near, pytest.raises(ChannelBroken, match=r"^tcp:127.0.0.1:[0-9]+: "):
        send_until_refused()


@pytest.mark.parametrize("kind", ["unix", "pipe"])
@pytest.mark.parametrize("how", ["shutdown", "close"])
def test_a_waiting_send_is_woken(kind, how, tmp_path):
    pieces = Scattered([100_000] * 50)
    channel, reader = opened(kind, tmp_path)
    outcome = []

    def send():
        try:
            channel.send_gathered(pieces.table)
        except ChannelBroken as broken:
            outcome.append(broken)

    with reader:
        thread = threading.Thread(target=send)
        thread.start()
        wait_until(lambda: channel.pending_output() > 0, 10, "something was sent")
        getattr(channel, how)()
        thread.join(10)
    assert str(outcome[0]) == f"{channel.description}: closed on this side"
    channel.close()
    with pytest.raises(ChannelBroken, match="closed on this side"):
        channel.send_gathered(pieces.table)


def test_a_channel_to_read_from_takes_nothing(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    with Listener(FileAddress(str(path))) as listener:
        channel = listener.accept()
    with channel, pytest.raises(ChannelBroken, match="can only be read from"):
        channel.send_gathered(Scattered([1]).table)


def test_a_page_that_cannot_be_read_is_told_as_such():
    """As the kernel says of poisoned memory: here it is memory that may not be read at all."""
    hole = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(hole))
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(address), 4096, 0) == 0
    channel, reader = opened("unix", None)
    with channel, reader, pytest.raises(ChannelBroken, match="a page of guest memory cannot be"):
        channel.send_gathered(np.array([[address, 4096]], np.uint64))
    assert libc.mprotect(ctypes.c_void_p(address), 4096, 3) == 0


def test_the_limit_is_the_kernels():
    assert os.sysconf("SC_IOV_MAX") == writev.IOV_MAX
