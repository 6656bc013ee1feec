"""``postcopy run --serial``: a file that takes nothing costs the output, and nothing else."""

import contextlib
import fcntl
import os
import struct
import termios

import pytest

from fakes.commands import DEADLINE_S, Running, need_kvm, postcopy
from fakes.waiting import wait_until

pytestmark = pytest.mark.kvm

# mov dx,0x3f8; mov al,'A'; out dx,al; jmp to the out
SPEAKS_FOR_EVER = bytes.fromhex("66baf803 b041 ee ebfd")


def put_through_everything(guest, folder):
    """Stop, continue, save and end it."""
    for order, then in (("stop", "paused"), ("cont", "running")):
        assert guest.ask(order) == {"return": {}}
        assert guest.ask("query-status")["return"]["status"] == then
    taken = postcopy("snapshot", "--from", guest.qmp, str(folder / "image"))
    assert taken.returncode == 0, taken.stderr
    assert guest.ask("query-status")["return"]["status"] == "running"
    assert guest.ask("quit") == {"return": {}}
    assert guest.process.wait(DEADLINE_S) == 0


@pytest.fixture
def image(tmp_path):
    need_kvm()
    path = tmp_path / "speaks.bin"
    path.write_bytes(SPEAKS_FOR_EVER)
    return str(path)


def test_a_full_disk(tmp_path, image):
    with Running(tmp_path, "qmp", "--image", image, "--serial", "file:/dev/full") as guest:
        said = "/dev/full: No space left on device; the guest goes on"
        wait_until(lambda: said in guest.stderr, DEADLINE_S, "word of the full disk")
        put_through_everything(guest, tmp_path)
        assert "bytes of the guest's serial output were lost" in guest.stderr


def test_a_pipe_that_nothing_reads_any_more(tmp_path, image):
    with Running(tmp_path, "qmp", "--image", image, "--serial", "stdio") as guest:
        guest.process.stdout.close()
        said = "standard output: Broken pipe; the guest goes on"
        wait_until(lambda: said in guest.stderr, DEADLINE_S, "word of the closed pipe")
        put_through_everything(guest, tmp_path)
        guest.process.stdout = None


def test_a_pipe_that_is_never_read(tmp_path, image):
    with Running(tmp_path, "qmp", "--image", image, "--serial", "stdio") as guest:
        wait_until(lambda: unread(guest.process.stdout), DEADLINE_S, "output of the guest")
        fill(guest.process.stdout)
        put_through_everything(guest, tmp_path)
        assert "bytes of the guest's serial output were lost" in guest.stderr


def unread(pipe):
    """How many bytes wait in a pipe."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def fill(pipe):
    """Leave no room in it.  A writer of many bytes may stop before: what does not fit into a page waits."""
    writer = os.open(f"/proc/self/fd/{pipe.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b".")
    os.close(writer)


def test_a_standard_error_that_is_never_read(tmp_path, image):
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))
    try:
        options = ["--image", image, "--serial", "file:/dev/full"]
        with Running(tmp_path, "qmp", *options, stderr=writer) as guest:
            put_through_everything(guest, tmp_path)
    finally:
        os.close(reader)
        os.close(writer)
