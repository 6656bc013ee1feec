"""Huge pages are received to where they belong, and whatever else comes in their midst is not lost."""

import random
import socket
import threading

import numpy as np
import pytest

from fakes.guest import RAM, FakeGuest
from fakes.waiting import wait_until
from postcopy.channel.sockets import SocketChannel
from postcopy.destination.loadvm import layout_of
from postcopy.destination.whole_pages import PageReceiver
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.placement import Placement
from postcopy.stream.decoder import PreemptDecoder
from postcopy.stream.numbers import RamFlag
from postcopy.stream.records import Pages

pytestmark = pytest.mark.userfaultfd

HUGE = 2 << 20
PER_PAGE = 512
COUNT = 6
DEADLINE_S = 30.0


class Stream:
    """Records, and the memory that they make."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._named = False
        self.records = bytearray()
        self.memory = np.zeros((COUNT * PER_PAGE, 4096), np.uint8)

    def data(self, piece):
        content = np.full(4096, self._random.randrange(1, 256), np.uint8)
        self._head(piece, RamFlag.PAGE)
        self.records += content.tobytes()
        self.memory[piece] = content

    def zero(self, piece):
        self._head(piece, RamFlag.ZERO)
        self.records += b"\0"
        self.memory[piece] = 0

    def page(self, page, zeros=()):
        for piece in range(page * PER_PAGE, (page + 1) * PER_PAGE):
            (self.zero if piece % PER_PAGE in zeros else self.data)(piece)

    def pieces(self):
        """All records, cut anywhere."""
        left = memoryview(bytes(self.records))
        while left:
            length = self._random.choice([1, 7, 4096, 4104, 300_000, 3_000_000])
            yield left[:length]
            left = left[length:]

    def _head(self, piece, kind):
        flags = kind | (RamFlag.CONTINUE if self._named else 0)
        self.records += int(piece * 4096 | flags).to_bytes(8, "big")
        if not self._named:
            self.records += bytes([len(RAM)]) + RAM.encode()
            self._named = True


class Arriving:
    """The end that receives, in a thread of its own."""

    def __init__(self):
        self.guest = FakeGuest(COUNT * HUGE, HUGE)
        self.ram = self.guest.incoming_ram()
        self.paged = self.ram[RAM]
        self.placement = Placement(self.ram, FaultTable(Blocktime({})))
        self.layout = layout_of(self.ram)
        self.decoder = PreemptDecoder(self.layout)
        ours, self.peer = socket.socketpair()
        self.channel = SocketChannel(ours, "t")
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        receiver = PageReceiver(self.ram, self.layout, self.placement)
        while receiver.receive(self.channel, self.decoder):
            while (record := self.decoder.next_record()) is not None:
                if isinstance(record, Pages):
                    self.placement.pages(
                        RAM, record.offsets, record.data, neighbours=record.neighbours
                    )
                else:
                    self.placement.zeros(RAM, record.offsets)

    def send(self, stream):
        for piece in stream.pieces():
            self.peer.sendall(piece)

    def end(self):
        self.peer.close()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        self.decoder.finish()

    @property
    def memory(self):
        return np.frombuffer(self.guest.memory(), np.uint8).reshape(-1, 4096)

    @property
    def received(self):
        return np.flatnonzero(~self.paged.pages.missing()).tolist()


@pytest.fixture(params=[False, True], ids=["precopy", "postcopy"])
def arriving(request):
    made = Arriving()
    if request.param:
        made.placement.listen(made.guest.open_userfaultfd())
    made.thread.start()
    yield made
    made.channel.close()
    made.guest.close()
    made.ram.close()


@pytest.mark.parametrize("seed", range(4))
def test_whole_pages(arriving, seed):
    stream = Stream(seed)
    for page in (3, 0, 1, 5):
        stream.page(page)
    stream.page(2, zeros=range(PER_PAGE))
    stream.page(4)
    arriving.send(stream)
    arriving.end()
    assert (arriving.memory == stream.memory).all()
    assert arriving.received == list(range(COUNT))
    assert arriving.decoder.position == len(stream.records)


@pytest.mark.parametrize("seed", range(4))
def test_zeros_among_the_pieces(arriving, seed):
    stream = Stream(seed)
    stream.page(0)
    stream.page(1, zeros={300, 301, 511})
    stream.page(2)
    stream.page(3, zeros={1})
    arriving.send(stream)
    arriving.end()
    assert (arriving.memory == stream.memory).all()
    assert arriving.received == [0, 1, 2, 3]


@pytest.mark.parametrize("pieces", [1, 3, 511])
def test_what_is_no_page_is_not_waited_behind(arriving, pieces):
    """The source sends a part of a page, and another, and then waits for an answer."""
    stream = Stream(0)
    stream.page(0)
    for piece in range(PER_PAGE, PER_PAGE + pieces):
        stream.data(piece)
    stream.page(2, zeros=range(PER_PAGE))
    arriving.send(stream)
    wait_until(lambda: 2 in arriving.received, DEADLINE_S, "the page behind it")
    for piece in range(PER_PAGE + pieces, 2 * PER_PAGE):
        stream.zero(piece)
    rest = stream.records[-9 * (PER_PAGE - pieces) :]
    arriving.peer.sendall(rest)
    arriving.end()
    assert (arriving.memory == stream.memory).all()
    assert arriving.received == [0, 1, 2]


def test_a_page_that_comes_again(arriving):
    """Before the guest runs the later one counts, then the first."""
    stream, again = Stream(1), Stream(2)
    for page in (0, 1, 2):
        stream.page(page)
    again.page(1)
    arriving.send(stream)
    arriving.send(again)
    later = arriving.placement._placers is None
    arriving.end()
    expected = stream.memory.copy()
    if later:
        expected[PER_PAGE : 2 * PER_PAGE] = again.memory[PER_PAGE : 2 * PER_PAGE]
    assert (arriving.memory == expected).all()
