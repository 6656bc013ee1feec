"""The second connection at the destination: what comes over it, how it ends, and who is told."""

import struct
import threading

import pytest

from fakes.guest import RAM, FakeGuest
from fakes.waiting import wait_until
from postcopy.channel.address import parse
from postcopy.channel.connect import connect
from postcopy.channel.listen import Listener
from postcopy.destination.incoming_channels import IncomingChannels, Surroundings
from postcopy.destination.loadvm import layout_of
from postcopy.destination.preempt_channel import PreemptChannel
from postcopy.errors import ChannelBroken, HostCannot, StreamCut, StreamError
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_table import FaultTable

PAGES = 16
PAGE, ZERO, CONTINUE = 0x08, 0x02, 0x20


def record(page, flag, data):
    """One RAM record, with the name of its block."""
    return struct.pack(">QB", page * 4096 | flag, len(RAM)) + RAM.encode() + data


def page_of(number):
    return record(number, PAGE, bytes([number + 1]) * 4096)


class Bench:
    """A preempt channel between a guest that never runs and a source."""

    def __init__(self, folder):
        self.wanted, self.timeout_ms = True, 0
        self.failed = threading.Event()
        self.guest = FakeGuest(PAGES * 4096)
        self.ram = self.guest.incoming_ram()
        (self.paged,) = self.ram
        self.address = parse(f"unix:{folder}/door")
        self.channels = IncomingChannels(Listener(self.address), lambda: self.wanted)
        surroundings = Surroundings(
            self.ram,
            FaultTable(Blocktime({})),
            layout_of(self.ram),
            lambda: self.timeout_ms,
            self.failed.set,
        )
        self.preempt = PreemptChannel(surroundings, lambda: self.wanted)
        try:
            self.userfaultfd = self.guest.open_userfaultfd()
        except HostCannot as reason:
            self.userfaultfd = None
            self.close()
            pytest.skip(str(reason))
        self.opened = []

    def connected(self):
        """Both connections are there, and the second one is listened to; return the source's end."""
        main = connect(self.address)
        self.opened += [main, self.channels.main()]
        self.preempt.expect(self.channels)
        source = connect(self.address)
        self.opened.append(source)
        self.preempt.accept()
        self.preempt.start(self.userfaultfd)
        return source

    def wait_placed(self, *pages):
        wait_until(
            lambda: all(self.paged.pages.is_settled(page) for page in pages), 10, "the pages"
        )

    def close(self):
        self.preempt.close()
        self.channels.close()
        if self.userfaultfd is not None:
            for channel in self.opened:
                channel.close()
            self.userfaultfd.close()
        self.ram.close()
        self.guest.close()


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.close()


def finishing(preempt):
    """Begin to finish, on a thread as the main channel's; return it and what it has raised."""
    raised = []

    def finish():
        try:
            preempt.finish()
        except (ChannelBroken, StreamError) as error:
            raised.append(error)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    return thread, raised


def test_pages_are_placed_as_they_come(bench):
    source = bench.connected()
    sent = page_of(3) + record(5, ZERO, b"\0") + page_of(4)
    source.send(sent)
    bench.wait_placed(3, 4, 5)
    assert bench.guest.touch(3) == bytes([4]) * 8
    assert bench.preempt.received_bytes == len(sent)
    assert bench.ram.missing_pages == PAGES - 3
    assert not bench.failed.is_set()


def test_switched_off_it_does_nothing(bench):
    bench.wanted = False
    bench.preempt.expect(bench.channels)
    bench.preempt.accept()
    bench.preempt.start(bench.userfaultfd)
    assert bench.preempt.received_bytes == 0
    bench.preempt.finish()


def test_a_source_that_opens_none_is_not_waited_for_longer_than_the_link_may_be_silent(bench):
    bench.timeout_ms = 10
    bench.preempt.expect(bench.channels)
    with pytest.raises(StreamError, match=r"no second connection within 0\.01 s"):
        bench.preempt.accept()


def test_whoever_waits_for_it_can_be_woken(bench):
    bench.preempt.expect(bench.channels)
    threading.Timer(0.01, bench.preempt.shutdown).start()
    with pytest.raises(ChannelBroken, match="no longer waiting"):
        bench.preempt.accept()


def test_the_end_waits_for_pages_that_were_asked_for(bench):
    source = bench.connected()
    bench.paged.pages.request(7)
    thread, raised = finishing(bench.preempt)
    source.send(page_of(7)[:2000])
    wait_until(lambda: bench.preempt.received_bytes == 2000, 10, "half a page")
    assert thread.is_alive()
    source.send(page_of(7)[2000:])
    thread.join(10)
    assert not thread.is_alive()
    assert raised == []
    assert bench.paged.pages.is_settled(7)
    assert bench.preempt.received_bytes == 0  # it has let go of the channel


def test_it_does_not_wait_for_the_source_to_close_when_nothing_is_on_its_way(bench):
    bench.connected()
    bench.preempt.finish()


def test_an_end_before_all_has_come_is_a_break(bench):
    source = bench.connected()
    bench.paged.pages.request(7)
    thread, raised = finishing(bench.preempt)
    source.close()
    thread.join(10)
    (error,) = raised
    assert isinstance(error, ChannelBroken)
    assert "ended before all requested pages had come" in str(error)
    assert not bench.failed.is_set()  # as a real QEMU ends it


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"\xff" * 64, StreamError), (page_of(2)[:100], StreamCut)],
    ids=["garbage", "half a page"],
)
def test_what_is_wrong_wakes_the_reader_of_the_main_channel(bench, data, kind):
    source = bench.connected()
    source.send(data)
    source.close()
    assert bench.failed.wait(10)
    assert isinstance(bench.preempt.failure, kind)
    with pytest.raises(kind):
        bench.preempt.finish()


def test_a_break_of_our_own_is_nobodys_failure(bench):
    bench.connected()
    bench.preempt.close()
    bench.preempt.close()
    assert bench.preempt.failure is None
    assert not bench.failed.is_set()


def test_the_next_connection_knows_nothing_of_the_last_ones_failure(bench):
    source = bench.connected()
    source.send(b"\xff" * 64)
    assert bench.failed.wait(10)
    bench.preempt.close()
    bench.channels.close()
    bench.channels = IncomingChannels(Listener(bench.address), lambda: True)
    again = bench.connected()
    assert bench.preempt.failure is None
    again.send(page_of(1))  # with its block's name: nothing of the other connection is remembered
    bench.wait_placed(1)


def test_a_page_that_the_main_channel_has_brought_is_left_as_it_is(bench):
    """The guest may have written to it meanwhile."""
    source = bench.connected()
    bench.paged.pages.receive(slice(6, 7))
    bench.paged.block.pages[6] = 99
    source.send(page_of(6) + page_of(8))
    bench.wait_placed(8)
    assert bench.paged.block.pages[6].tolist() == [99] * 4096


def test_names_travel_once(bench):
    source = bench.connected()
    source.send(page_of(1) + struct.pack(">Q", 2 * 4096 | PAGE | CONTINUE) + bytes([3]) * 4096)
    bench.wait_placed(1, 2)
    assert bench.guest.touch(2) == bytes([3]) * 8


def test_an_end_of_it_alone_is_a_break(bench):
    """A middlebox has dropped this one: what is asked for would come no more, with no sign of it."""
    bench.timeout_ms = 50
    source = bench.connected()
    source.close()
    assert bench.failed.wait(10)
    assert isinstance(bench.preempt.failure, ChannelBroken)
    assert "the source closed the second connection" in str(bench.preempt.failure)


def test_an_end_that_the_main_channels_follows_is_none(bench):
    bench.timeout_ms = 60_000
    source = bench.connected()
    source.close()
    wait_until(lambda: bench.preempt._ended, 10, "its end")
    bench.preempt.finish()
    assert bench.preempt.failure is None
    assert not bench.failed.is_set()
