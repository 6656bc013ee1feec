"""A guest's serial output goes to files that are full, closed or slow, and no vCPU waits for them."""

import os

import pytest

from fakes.waiting import wait_until
from machine.machines import MIB, Watched, need
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.run_control import RunState
from postcopy.machine.serial_output import SerialOutput


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    os.close(writer)
    os.close(reader)


def read_exactly(fd, length):
    data = b""
    while len(data) < length:
        data += os.read(fd, length - len(data))
    return data


def test_everything_comes_in_order(pipe):
    reader, writer = pipe
    output = SerialOutput(writer)
    said = bytes(range(256)) * 40
    for at in range(0, len(said), 100):
        output.write(said[at : at + 100])
    assert read_exactly(reader, len(said)) == said
    assert output.close()
    assert output.dropped_bytes == 0


def test_close_writes_what_is_waiting(tmp_path):
    with (tmp_path / "out").open("wb") as file:
        output = SerialOutput(file.fileno())
        output.write(b"the last words")
        assert output.close()
    assert (tmp_path / "out").read_bytes() == b"the last words"


@pytest.mark.parametrize("is_blocking", [True, False])
def test_what_a_slow_reader_leaves_no_room_for_is_dropped_and_counted(pipe, is_blocking):
    reader, writer = pipe
    os.set_blocking(writer, is_blocking)
    output = SerialOutput(writer, buffer_bytes=1000)
    given = 3 << 20
    for _ in range(given // 1024):
        output.write(b"x" * 1024)
    assert output.dropped_bytes > 0
    assert not output.close(timeout_s=0)
    assert os.get_blocking(writer) is is_blocking
    arrived = 0
    while arrived + output.dropped_bytes < given:
        arrived += len(os.read(reader, 65536))
    assert arrived + output.dropped_bytes == given
    assert output.close()


def test_a_full_disk_is_told_once_and_outlived():
    reasons = []
    full = os.open("/dev/full", os.O_WRONLY)
    output = SerialOutput(full, reasons.append)
    for count in range(1, 4):
        output.write(b"word")
        wait_until(lambda count=count: output.dropped_bytes == 4 * count)
    assert reasons == ["No space left on device"]
    assert output.close()
    os.close(full)


def test_a_pipe_that_nothing_reads_any_more_is_told():
    reasons = []
    reader, writer = os.pipe()
    os.close(reader)
    output = SerialOutput(writer, reasons.append)
    output.write(b"word")
    wait_until(lambda: output.dropped_bytes == 4)
    assert reasons == ["Broken pipe"]
    assert output.close()
    os.close(writer)


SPEAKS_FOR_EVER = bytes.fromhex("66baf803 b041 ee ebfd")


@pytest.mark.parametrize("accelerator", ["kvm", "unicorn"])
def test_a_device_that_fails_stops_the_machine_and_says_why(accelerator):
    need(accelerator)

    def broken(_data):
        raise OSError(28, "No space left on device")

    config = MachineConfig(2 * MIB, accel=accelerator, image=SPEAKS_FOR_EVER)
    with Machine(config, on_serial=broken) as machine:
        machine.start()
        wait_until(lambda: machine.run_state is RunState.INTERNAL_ERROR)
        assert "No space left on device" in str(machine.failure)
        assert "vCPU 0 cannot go on" in str(machine.failure)
        machine.stop()


@pytest.mark.parametrize("accelerator", ["kvm", "unicorn"])
def test_a_machine_that_is_closed_may_be_told_to_fail(accelerator):
    need(accelerator)
    for _ in range(20):
        with Watched(MachineConfig(2 * MIB, accel=accelerator, image=SPEAKS_FOR_EVER)) as watched:
            watched.machine.start()
            wait_until(lambda watched=watched: watched.serial)
        watched.machine.fail("too late")  # a signal to a thread that has ended would be a SIGSEGV
