"""What a front end may not send: refused by name and place, and nothing of it is left behind."""

import os
import socket
import struct

import pytest

from fakes import vhost_front_end as wire
from fakes.vhost_back_end import Guest
from fakes.vhost_front_end import Closed, FrontEnd, Ram, Ring
from fakes.waiting import wait_until
from vhost_user.hostile import flood

MESSAGES = int(os.environ.get("POSTCOPY_MESSAGES", "25000"))
SEED = int(os.environ.get("POSTCOPY_SEED", "0"))


@pytest.mark.parametrize("seed", range(4))
def test_no_message_does_anything_but_be_done_or_refused(disk, seed):
    hostile = flood(disk, SEED or seed, MESSAGES)
    assert hostile.refused > MESSAGES // 100
    names = [name for name in vars(wire) if name.startswith(("GET_", "SET_", "POSTCOPY_"))]
    assert sum(any(name in text for text in hostile.said) for name in names) > 15


def region(guest=0, size=1 << 20, user=0, offset=0):
    return struct.pack("=QQQQ", guest, size, user, offset)


def table(*regions):
    return struct.pack("=II", len(regions), 0) + b"".join(regions)


def u64(value):
    return struct.pack("=Q", value)


def state(index, value):
    return struct.pack("=II", index, value)


def log(size, offset=0):
    return struct.pack("=QQ", size, offset)


def config(offset, size, data=b""):
    return struct.pack("=III", offset, size, 0) + data


def addresses(descriptors, used, available, index=0):
    return struct.pack("=IIQQQQ", index, 0, descriptors, used, available, 0)


MIB = 1 << 20
TWO = (region(), region(guest=MIB - 4096, user=1 << 40))
SAME_USER = (region(), region(guest=1 << 40, user=MIB - 1))

REFUSED = [
    # number, payload, descriptors, what is said
    (0, b"", 0, "message 0 is not taken here (at byte 0x0)"),
    (wire.GET_FEATURES, u64(0), 0, "GET_FEATURES: 8 bytes of payload, and at most 0 are"),
    (wire.GET_FEATURES, b"", 1, "GET_FEATURES: 1 descriptors, and it has 0 (at byte 0x0)"),
    (wire.SET_FEATURES, b"abc", 0, "SET_FEATURES: 3 bytes of payload, and it has 8 (at byte 0x8)"),
    (wire.SET_FEATURES, u64(1 << 63), 0, "SET_FEATURES: 0x8000000000000000 was not offered"),
    (wire.SET_PROTOCOL_FEATURES, u64(1 << 40), 0, "SET_PROTOCOL_FEATURES: 0x10000000000 was not offered"),
    (wire.SET_MEM_TABLE, table() + bytes(32), 0, "SET_MEM_TABLE: 0 regions, and 1 to 8 are possible"),
    (wire.SET_MEM_TABLE, state(9, 0) + bytes(256), 8, "SET_MEM_TABLE: 9 regions, and 1 to 8 are possible"),
    (wire.SET_MEM_TABLE, state(2, 0) + bytes(32), 1, "SET_MEM_TABLE: 40 bytes of payload, and 2 regions"),
    (wire.SET_MEM_TABLE, table(region()), 0, "SET_MEM_TABLE: 0 descriptors, and it has 1"),
    (wire.SET_MEM_TABLE, table(region()), 2, "SET_MEM_TABLE: 2 descriptors, and it has 1"),
    (wire.SET_MEM_TABLE, table(region()), 9, "a message's header: more than 8 descriptors"),
    (wire.SET_MEM_TABLE, table(region(size=0)), 1, "SET_MEM_TABLE: a region of 0 bytes (at byte 0x1c)"),
    (wire.SET_MEM_TABLE, table(region(guest=(1 << 64) - 4096)), 1, "goes beyond 64 bits (at byte 0x14)"),
    (wire.SET_MEM_TABLE, table(region(size=MIB + 1)), 1, "a region of 0x100001 bytes from 0x0 on leaves"),
    (wire.SET_MEM_TABLE, table(region(offset=4096)), 1, "a region of 0x100000 bytes from 0x1000"),
    (wire.SET_MEM_TABLE, table(*TWO), 2, "the regions at guest addresses 0x0 and 0xff000 overlap"),
    (wire.SET_MEM_TABLE, table(*SAME_USER), 2, "regions at guest addresses 0x0 and 0x10000000000 overlap"),
    (wire.SET_MEM_TABLE, u64(0), 0, "SET_MEM_TABLE: an acknowledgement, and no memory table was answered"),
    (wire.ADD_MEM_REG, u64(0) + region(), 0, "ADD_MEM_REG: 0 descriptors, and it has 1"),
    (wire.REM_MEM_REG, u64(0) + region(guest=4096), 0, "REM_MEM_REG: there is no region at guest address"),
    (wire.SET_LOG_BASE, log(4096), 0, "SET_LOG_BASE: 0 descriptors, and it has 1"),
    (wire.SET_LOG_BASE, log(0), 1, "SET_LOG_BASE: a log of 0x0 bytes from 0x0 on, in a file"),
    (wire.SET_LOG_BASE, log(MIB, 4096), 1, "SET_LOG_BASE: a log of 0x100000 bytes from 0x1000 on"),
    (wire.SET_LOG_BASE, log(4096, 8), 1, "SET_LOG_BASE: a log of 0x1000 bytes from 0x8 on"),
    (wire.SET_VRING_NUM, state(1, 64), 0, "SET_VRING_NUM: ring 1 of 1 (at byte 0xc)"),
    (wire.SET_VRING_NUM, state(0, 63), 0, "SET_VRING_NUM: a ring of 63 entries; a power of 2 up to 32768"),
    (wire.SET_VRING_NUM, state(0, 0), 0, "SET_VRING_NUM: a ring of 0 entries"),
    (wire.SET_VRING_ADDR, addresses(0x1000, 0x2000, 0x3000), 0, "bytes at 0x1000 are in no region"),
    (wire.SET_VRING_KICK, u64(0), 0, "SET_VRING_KICK: 0 descriptors, and it has 1"),
    (wire.SET_VRING_KICK, u64(0x100), 0, "SET_VRING_KICK: a ring without a kick would have to be polled"),
    (wire.SET_VRING_KICK, u64(0x200), 1, "SET_VRING_KICK: 0x200 names no ring (at byte 0xc)"),
    (wire.SET_VRING_CALL, u64(0x100), 1, "SET_VRING_CALL: 1 descriptors, and it has 0"),
    (wire.SET_VRING_CALL, u64(7), 1, "SET_VRING_CALL: ring 7 of 1"),
    (wire.SET_VRING_ENABLE, state(0, 2), 0, "SET_VRING_ENABLE: 2 is neither on nor off (at byte 0x10)"),
    (wire.GET_CONFIG, config(0, 8), 0, "GET_CONFIG: 8 bytes of configuration from 0 on, with 12"),
    (wire.GET_CONFIG, config(250, 8, bytes(8)), 0, "GET_CONFIG: 8 bytes of configuration from 250 on"),
    (wire.SET_BACKEND_REQ_FD, b"", 1, "SET_BACKEND_REQ_FD: its descriptor is no socket"),
    (wire.POSTCOPY_LISTEN, b"", 0, "POSTCOPY_LISTEN: after POSTCOPY_ADVISE only, and the stage is NONE"),
    (19, u64(0), 0, "SEND_RARP is not taken here"),
    (31, bytes(24), 0, "GET_INFLIGHT_FD is not taken here"),
]  # fmt: skip


class Server:
    """The front ends that come and go at one back end."""

    def __init__(self, back_end):
        self.back_end = back_end
        self.file = os.memfd_create("hostile")
        os.ftruncate(self.file, MIB)

    def wait_said(self, words):
        def said():
            return words in self.back_end.said

        wait_until(said, 10, lambda: f"{words!r} in {self.back_end.said!r}")

    def still_serves(self):
        guest = Guest(self.back_end.path).start()
        assert guest.driver.read(1, 512) == struct.pack("<Q", 1) * 64
        guest.close()


@pytest.fixture
def server(back_end):
    made = Server(back_end)
    yield made
    os.close(made.file)


def check_closed(front_end):
    with pytest.raises(Closed):
        front_end.receive()


@pytest.mark.parametrize(("number", "payload", "count", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_name_and_place(server, number, payload, count, words):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.negotiate()
        front_end.send(number, payload, [server.file] * count)
        check_closed(front_end)
    server.wait_said(words)
    server.still_serves()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack("=III", 1, 0, 0), "GET_FEATURES: flags 0x0 (at byte 0x4)"),
        (struct.pack("=III", 1, 0x11, 0), "GET_FEATURES: flags 0x11 (at byte 0x4)"),
        (struct.pack("=III", 1, 5, 0), "GET_FEATURES: an answer to no message (at byte 0x4)"),
        (struct.pack("=III", 5, 1, 1 << 31), "SET_MEM_TABLE: 2147483648 bytes of payload, and at most 264"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(server, data, words):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.send_raw(data)
        check_closed(front_end)
    server.wait_said(words)


@pytest.mark.parametrize("cut", [1, 11, 12, 19])
def test_half_a_message_is_refused(server, cut):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.send_raw((struct.pack("=III", 2, 1, 8) + bytes(8))[:cut])
    server.wait_said("bytes of a header of 12" if cut < 12 else "SET_FEATURES: ")
    server.still_serves()


def test_what_was_not_agreed_on_is_refused(server):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.negotiate(protocol=0)
        front_end.send(wire.POSTCOPY_ADVISE)
        check_closed(front_end)
    server.wait_said("POSTCOPY_ADVISE: PAGEFAULT has not been agreed on")


def test_a_driver_of_the_old_kind_is_refused(server):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.negotiate(features=~wire.VERSION_1)
        front_end.send(wire.SET_VRING_KICK, u64(0), [server.file])
        check_closed(front_end)
    server.wait_said("the driver has not agreed on VERSION_1; give it a modern device")


def test_a_log_that_ends_before_memory_does_is_refused(server):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.negotiate()
        front_end.do(wire.SET_MEM_TABLE, table(region(guest=1 << 40)), [server.file])
        front_end.send(wire.SET_LOG_BASE, log(4096), [server.file])
        check_closed(front_end)
    server.wait_said(
        "SET_LOG_BASE: the dirty log covers guest addresses up to 0x8000000, and memory ends at"
    )


@pytest.mark.userfaultfd
@pytest.mark.parametrize(
    ("number", "payload", "words"),
    [
        (wire.SET_VRING_NUM, state(0, 64), "SET_VRING_NUM: the acknowledgement of the memory table is due"),
        (wire.SET_MEM_TABLE, u64(1), "SET_MEM_TABLE: the front end failed with our memory table (1)"),
        (wire.POSTCOPY_END, b"", "POSTCOPY_END: the acknowledgement of the memory table is due"),
    ],
)  # fmt: skip
def test_the_order_of_postcopy_is_kept(server, number, payload, words):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.negotiate()
        _, (userfaultfd,) = front_end.ask(wire.POSTCOPY_ADVISE)
        assert front_end.do(wire.POSTCOPY_LISTEN) == 0
        front_end.ask(wire.SET_MEM_TABLE, table(region()), [server.file])
        front_end.send(number, payload)
        check_closed(front_end)
        os.close(userfaultfd)
    server.wait_said(words)
    server.still_serves()


def test_memory_before_listening_is_refused(server):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.negotiate()
        front_end.do(wire.SET_MEM_TABLE, table(region()), [server.file])
        _, (userfaultfd,) = front_end.ask(wire.POSTCOPY_ADVISE)
        front_end.send(wire.POSTCOPY_LISTEN)
        check_closed(front_end)
        os.close(userfaultfd)
    server.wait_said("POSTCOPY_LISTEN: there is a memory table already")


def test_a_circle_in_a_ring_stops_that_ring_alone(server):
    guest = Guest(server.back_end.path).start()
    memory, ring = guest.ram.bytes, guest.ring
    memory[ring.descriptors : ring.descriptors + 16] = struct.pack("<QIHH", 0x40000, 16, 1, 0)
    ring.offer(0)
    ring.notify()
    server.wait_said("ring 0: descriptor 0: a circle, or a chain of more than 1024")
    assert os.eventfd_read(ring.error) == 1
    assert guest.front_end.configuration(8) == struct.pack("<Q", 4096)
    ring.index = 0
    memory[ring.available : ring.available + 4] = bytes(4)
    ring.set_up(guest.front_end)
    assert guest.driver.read(1, 512) == struct.pack("<Q", 1) * 64
    guest.close()


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ([(1 << 40, 16, 0), (0x30000, 1, 2)], "guest address 0x10000000000 is in no region of memory"),
        ([((4 << 20) - 8, 16, 0), (0x30000, 1, 2)], "guest address 0x400000 is in no region of memory"),
        ([(0x20000, 16, 0)], "a block request without a byte for its status"),
        ([(0x20000, 8, 0), (0x30000, 1, 2)], "a block request with 8 bytes for its header of 16"),
    ],
)  # fmt: skip
def test_a_request_that_is_none_stops_its_ring(server, chain, words):
    guest = Guest(server.back_end.path).start()
    guest.ring.put(*chain)
    guest.ring.notify()
    server.wait_said(f"ring 0: {words}")
    guest.close()
    server.still_serves()


def test_a_kick_that_is_no_eventfd_stops_its_ring(server):
    ram = Ram()
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.negotiate()
        front_end.set_memory(ram)
        ring = Ring(ram)
        os.close(ring.kick)
        ring.kick = os.open(os.devnull, os.O_RDONLY)
        ring.set_up(front_end)
        server.wait_said("ring 0: its kick has ended")
        ring.close()
    ram.close()


def test_the_channel_to_the_front_end_is_taken(server):
    with FrontEnd.connect(server.back_end.path) as front_end:
        front_end.negotiate()
        theirs, ours = socket.socketpair()
        assert front_end.do(wire.SET_BACKEND_REQ_FD, fds=[theirs.fileno()]) == 0
        theirs.close()
        ours.close()
        assert front_end.configuration(8) == struct.pack("<Q", 4096)
