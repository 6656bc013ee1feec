"""CPUs do not sleep while the guest changes sides: threads at work on that would wait for one."""

import os
import socket

import numpy as np
import pytest

from fakes.cpus import CpusNoted
from fakes.guest import RAM, LocalDestination, need_missing_pages
from postcopy.destination import postcopy
from postcopy.parameters import Capabilities, Capability
from postcopy.status import Status
from postcopy.stream import encoder
from postcopy.stream.commands import encode_command
from postcopy.stream.records import BlockEntry, Configuration, PostcopyAdvise, RamDiscard, RamSetup

SIZE = 1 << 20


@pytest.fixture
def cpus(monkeypatch):
    noted = CpusNoted()
    monkeypatch.setattr(postcopy, "CpusAwake", lambda: noted)
    return noted


def take(*commands):
    """Let a destination take these, and then the end of the connection."""
    need_missing_pages()
    near, far = socket.socketpair()
    setup = RamSetup(2, (BlockEntry(RAM, SIZE),))
    with near, far:
        destination = LocalDestination(
            os.dup(far.fileno()), SIZE, Capabilities(frozenset({Capability.POSTCOPY_RAM}))
        )
        near.sendall(encoder.stream_start(Configuration("microvm")))
        near.sendall(encode_command(PostcopyAdvise(4096, 4096)))
        near.sendall(encoder.ram_setup(setup, postcopy=True))
        near.sendall(b"".join(map(encode_command, commands)))
        near.shutdown(socket.SHUT_WR)
        assert destination.run() is Status.FAILED
        destination.close()


def test_from_the_first_discard_on(cpus):
    take(RamDiscard(RAM, np.array([[0, 4096]], np.uint64)))
    assert cpus.calls[0] == "a while"
    assert set(cpus.calls[1:]) == {"close"}


def test_not_in_precopy(cpus):
    take()
    assert set(cpus.calls) == {"close"}
