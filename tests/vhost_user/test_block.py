"""``postcopy vhost-user-blk`` under the tests' own front end."""

import os
import select
import signal
import socket
import struct

import pytest

from fakes.commands import one_line, postcopy
from fakes.vhost_back_end import BackEnd, Guest
from fakes.vhost_front_end import (
    ADD_MEM_REG,
    GET_MAX_MEM_SLOTS,
    GET_QUEUE_NUM,
    GET_VRING_BASE,
    INDIRECT,
    LOG_ALL,
    OUT,
    PROTOCOL_FEATURES,
    REM_MEM_REG,
    SET_BACKEND_REQ_FD,
    SET_CONFIG,
    SET_LOG_BASE,
    SET_VRING_ENABLE,
    VERSION_1,
    WRITE,
    Ram,
)
from fakes.waiting import wait_until

SECTORS = 4096


def sector(number):
    return struct.pack("<Q", number) * 64


def test_it_offers_what_a_front_end_needs(connected):
    guest = connected()
    wanted = LOG_ALL | PROTOCOL_FEATURES | VERSION_1 | INDIRECT | 1 << 9 | 1 << 6 | 1 << 2
    assert guest.front_end.offered == wanted
    assert guest.front_end.number(GET_QUEUE_NUM) == 1
    assert guest.front_end.number(GET_MAX_MEM_SLOTS) == 32


def test_blocks_are_read_and_written_and_flushed(connected, disk):
    driver = connected().start().driver
    assert driver.read(17, 4096) == b"".join(map(sector, range(17, 25)))
    assert driver.write(100, b"x" * 512) == 0
    assert driver.flush() == 0
    assert disk.read_bytes()[100 * 512 : 101 * 512] == b"x" * 512
    assert driver.read(100, 512) == b"x" * 512


def test_many_requests_in_flight_go_round_the_ring(connected, disk):
    guest = connected().start()
    driver, ring = guest.driver, guest.ring
    for first in range(0, 1600, 16):
        slots = [
            driver.submit(OUT, first + n, sector(9000 + first + n), kick=False) for n in range(16)
        ]
        ring.notify()
        for _ in slots:
            ring.wait()
        assert [driver.status(slot) for slot in slots] == [0] * 16
    assert disk.read_bytes()[: 1600 * 512] == b"".join(map(sector, range(9000, 10600)))


def test_the_configuration_has_the_capacity(connected):
    front_end = connected().front_end
    assert struct.unpack("<Q", front_end.configuration(8)) == (SECTORS,)
    assert struct.unpack("<I", front_end.configuration(4, offset=20)) == (512,)
    assert len(front_end.configuration(256)) == 256


def test_a_write_to_the_configuration_is_refused(connected, back_end):
    guest = connected().start()
    assert guest.front_end.do(SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\0") == 1
    assert guest.driver.read(0, 512) == sector(0)
    assert "SET_CONFIG: no field of the configuration can be written" in back_end.said


def test_an_error_of_the_disk_is_the_requests_and_the_ring_goes_on(connected):
    driver = connected().start().driver
    slot = driver.submit(OUT, SECTORS, b"x" * 512)
    driver.ring.wait()
    assert driver.status(slot) == 1
    assert driver.read(1, 512) == sector(1)


def test_memory_may_be_in_regions_with_gaps_and_a_buffer_cross_two(connected):
    guest = connected(ram=Ram(4 << 20, parts=4))
    guest.start()
    driver, edge = guest.driver, (1 << 20) - 512
    guest.ram.bytes[driver.HEADERS : driver.HEADERS + 16] = struct.pack("<IIQ", 0, 0, 5)
    chain = ((driver.HEADERS, 16, 0), (edge, 1024, WRITE), (driver.STATUSES, 1, WRITE))
    guest.ring.put(*chain)
    guest.ring.notify()
    assert guest.ring.wait()[1] == 1025
    assert guest.ram.bytes[edge : edge + 1024] == sector(5) + sector(6)
    apart = connected_apart(guest)
    assert apart == (1 << 20) + (1 << 16)


def connected_apart(guest):
    """Where the second region begins if there is a gap of 64 KiB."""
    ram = Ram(4 << 20, parts=4, gap=1 << 16)
    ram.close()
    return ram.guest(1 << 20)


def test_regions_come_and_go_one_by_one(connected):
    guest = connected().start()
    more = Ram(1 << 20)
    address = 1 << 30
    region = struct.pack("=QQQQQ", 0, address, more.size, more.user, 0)
    assert guest.front_end.do(ADD_MEM_REG, region, [more.fd]) == 0
    driver = guest.driver
    guest.ram.bytes[driver.HEADERS : driver.HEADERS + 16] = struct.pack("<IIQ", 0, 0, 7)
    guest.ring.put((driver.HEADERS, 16, 0), (address, 512, WRITE), (driver.STATUSES, 1, WRITE))
    guest.ring.notify()
    guest.ring.wait()
    assert more.bytes[:512] == sector(7)
    assert guest.front_end.do(REM_MEM_REG, region, [more.fd]) == 0
    assert driver.read(8, 512) == sector(8)
    more.close()


def test_a_ring_that_is_stopped_says_where_and_goes_on_from_there(connected):
    guest = connected().start()
    for number in range(3):
        guest.driver.read(number, 512)
    answer, _ = guest.front_end.ask(GET_VRING_BASE, struct.pack("=II", 0, 0))
    assert struct.unpack("=II", answer) == (0, 3)
    guest.driver.submit(OUT, 3, b"y" * 512)
    guest.ring.set_up(guest.front_end, base=3)
    guest.ring.wait()
    assert guest.driver.read(3, 512) == b"y" * 512


def test_a_driver_that_another_back_end_told_not_to_kick_is_told_to(connected):
    guest = connected()
    guest.ram.bytes[guest.ring.used : guest.ring.used + 2] = b"\1\0"
    guest.start()
    assert guest.driver.read(0, 512) == sector(0)
    assert guest.ram.bytes[guest.ring.used : guest.ring.used + 2] == b"\0\0"


def test_a_driver_is_interrupted_once_for_what_another_back_end_may_have_left(connected):
    guest = connected().start()
    assert select.select([guest.ring.call], [], [], 30)[0]


def test_a_ring_that_is_not_enabled_is_left_alone(connected, disk):
    guest = connected().start(enable=False)
    guest.driver.submit(OUT, 0, b"z" * 512)
    guest.front_end.configuration(8)  # it has seen the kick before it answers
    assert guest.ring.used_index() == 0
    assert disk.read_bytes()[:512] == sector(0)
    assert guest.front_end.do(SET_VRING_ENABLE, struct.pack("=II", 0, 1)) == 0
    guest.ring.wait()
    assert disk.read_bytes()[:512] == b"z" * 512


def log_of(front_end, size=4096):
    fd = os.memfd_create("log")
    os.ftruncate(fd, size)
    front_end.send(SET_LOG_BASE, struct.pack("=QQ", size, 0), [fd])
    front_end.answer_to(SET_LOG_BASE)
    return fd


def marked(fd):
    """The pages whose bits are set; they are cleared."""
    data = os.pread(fd, 4096, 0)
    os.pwrite(fd, bytes(4096), 0)
    return {8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}


def test_what_it_writes_is_in_the_dirty_log_and_nothing_else(connected):
    guest = connected()
    guest.front_end.set_memory(guest.ram)
    fd = log_of(guest.front_end)
    guest.front_end.set_features(guest.front_end.features | LOG_ALL)
    guest.ring.set_up(guest.front_end, log=guest.ring.used)
    driver = guest.driver
    used, status = guest.ring.used >> 12, driver.STATUSES >> 12
    driver.read(0, 8192)
    first = driver.data_at(0) >> 12
    # Its last bit, that of the used ring, is set before the next message is answered.
    guest.front_end.configuration(8)
    assert marked(fd) == {first, first + 1, status, used}
    assert driver.write(0, b"w" * 4096) == 0
    guest.front_end.configuration(8)
    assert marked(fd) == {status, used}
    other = log_of(guest.front_end)
    driver.read(9, 512)
    guest.front_end.configuration(8)
    assert (marked(fd), len(marked(other))) == (set(), 3)
    guest.front_end.set_features(guest.front_end.features & ~LOG_ALL)
    driver.read(9, 512)
    guest.front_end.configuration(8)
    assert marked(other) == set()
    os.close(fd)
    os.close(other)


def test_a_readonly_disk_refuses_writes(tmp_path, disk):
    with BackEnd(tmp_path, disk, "--readonly") as back_end:
        guest = Guest(back_end.path).start()
        assert guest.front_end.offered & 1 << 5
        assert guest.driver.write(0, b"x" * 512) == 1
        assert guest.driver.read(0, 512) == sector(0)
        guest.close()


def test_each_of_several_rings_is_served(tmp_path, disk):
    with BackEnd(tmp_path, disk, "--num-queues", "3") as back_end:
        guest = Guest(back_end.path)
        assert guest.front_end.number(GET_QUEUE_NUM) == 3
        assert struct.unpack_from("<H", guest.front_end.configuration(60), 34) == (3,)
        guest.start(number=2)
        assert guest.driver.read(5, 512) == sector(5)
        guest.close()


def test_the_next_front_end_is_served_when_one_has_gone(connected):
    first = connected().start()
    assert first.driver.read(0, 512) == sector(0)
    first.front_end.close()
    assert connected().start().driver.read(1, 512) == sector(1)


def test_a_disk_that_has_grown_is_told_to_the_front_end(connected, back_end, disk):
    guest = connected().start()
    channel, theirs = socket.socketpair()
    assert guest.front_end.do(SET_BACKEND_REQ_FD, fds=[theirs.fileno()]) == 0
    theirs.close()
    with disk.open("ab") as file:
        file.write(b"g" * 4096)
    back_end.process.send_signal(signal.SIGUSR1)
    channel.settimeout(30)
    assert channel.recv(64) == struct.pack("=III", 2, 1, 0)
    assert struct.unpack("<Q", guest.front_end.configuration(8)) == (SECTORS + 8,)
    assert guest.driver.read(SECTORS, 4096) == b"g" * 4096
    guest.front_end.close()
    assert struct.unpack("<Q", connected().front_end.configuration(8)) == (SECTORS + 8,)
    channel.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_told_to_and_takes_its_socket_away(connected, back_end, number):
    guest = connected().start()
    assert guest.driver.read(0, 512) == sector(0)
    assert back_end.end(number) == 0
    assert not back_end.path.exists()
    assert back_end.said == ""


def test_killed_it_leaves_no_process_and_its_socket_is_taken_over(
    connected, back_end, tmp_path, disk
):
    guest = connected().start()
    back_end.end(signal.SIGKILL)
    wait_until(guest.front_end.closed, 10, "the end of the process that served")
    with BackEnd(tmp_path, disk) as other:
        again = Guest(other.path).start()
        assert again.driver.read(2, 512) == sector(2)
        again.close()


def test_memory_that_is_cut_ends_one_front_end_only(connected, back_end):
    guest = connected().start()
    os.ftruncate(guest.ram.fd, 4096)
    os.eventfd_write(guest.ring.kick, 1)
    wait_until(lambda: "SIGBUS" in back_end.said, 10, "a word of it")
    assert connected().start().driver.read(3, 512) == sector(3)


def test_a_socket_that_is_listened_at_is_refused(back_end, disk):
    outcome = postcopy("vhost-user-blk", "--socket", str(back_end.path), str(disk))
    assert outcome.returncode == 1
    assert one_line(outcome).endswith("give another path, or end what listens there")


def test_what_is_no_disk_is_refused(tmp_path):
    outcome = postcopy("vhost-user-blk", "--socket", str(tmp_path / "s"), str(tmp_path / "none"))
    assert outcome.returncode == 3
    assert "No such file or directory" in one_line(outcome)
