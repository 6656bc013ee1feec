"""Precopy that might have become postcopy: nobody mends a fault of a device that is being loaded."""

import socket
import threading

import pytest

from destination.test_package_waits import Needy
from fakes.guest import RAM, LocalDestination, need_missing_pages
from postcopy.parameters import Capabilities, Capability
from postcopy.status import Status
from postcopy.stream import encoder
from postcopy.stream.commands import encode_command
from postcopy.stream.numbers import SectionType
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    DeviceSection,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamSetup,
)

SIZE = 1 << 20
END_OF_RAM = encoder.RamPart(2, SectionType.END).around()
TIMER = encoder.device_section(DeviceSection(3, "timer", 0, 2, bytes(24)))
PACKAGE = encode_command(
    Package(b"".join(map(encode_command, [PostcopyListen(), Ping(3), PostcopyRun()])))
)


def beginning():
    setup = RamSetup(2, (BlockEntry(RAM, SIZE),))
    return (
        encoder.stream_start(Configuration("microvm"))
        + encode_command(OpenReturnPath())
        + encode_command(PostcopyAdvise(4096, 4096))
        + encoder.ram_setup(setup, postcopy=True)
    )


@pytest.fixture
def take():
    """``take(stream)``: a destination that has taken it and nothing more, or hangs."""
    need_missing_pages()
    made = []

    def run(stream):
        ours, theirs = socket.socketpair()
        postcopy = Capabilities(frozenset({Capability.POSTCOPY_RAM}))
        destination = LocalDestination(theirs.detach(), SIZE, postcopy, guest=Needy)
        made.append(destination)
        thread = threading.Thread(target=destination.run, daemon=True)
        with ours:
            thread.start()
            ours.sendall(stream)
            ours.shutdown(socket.SHUT_WR)
            thread.join(10)
        hangs = thread.is_alive()
        destination.guest.unwatch_missing()
        thread.join(10)
        assert not hangs
        return destination

    yield run
    for destination in made:
        destination.close()


@pytest.mark.parametrize("asked", [b"", encode_command(Ping(5))], ids=["at the end", "when asked"])
def test_they_are_loaded(take, asked):
    destination = take(beginning() + END_OF_RAM + TIMER + asked + encoder.end_of_stream())
    assert destination.statuses[-1] is Status.COMPLETED
    assert destination.guest.calls == ["load", "resume"]


def test_there_is_no_way_to_postcopy_from_there(take):
    """The memory is not watched any more: what is missing would read as zeros."""
    destination = take(beginning() + TIMER + encode_command(Ping(5)) + PACKAGE)
    assert destination.statuses[-1] is Status.FAILED
    assert "CMD_POSTCOPY_LISTEN in wrong postcopy state" in str(destination.job.error)
    assert "resume" not in destination.guest.calls


def test_nor_are_there_devices_behind_a_package(take):
    destination = take(beginning() + PACKAGE + TIMER + encode_command(Ping(5)))
    assert "section timer behind the package" in str(destination.job.error)
