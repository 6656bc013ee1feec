"""Descriptors that a stream can go through, and all the others."""

import contextlib
import os
import select
import socket

import pytest

from postcopy.channel.descriptor_check import Use, can_answer, check_descriptor
from postcopy.errors import Refused


class Maker:
    """Opens what a test asks for, and closes all of it, the other ends too."""

    def __init__(self, folder):
        self.folder = folder
        self.stack = contextlib.ExitStack()

    def owned(self, number):
        self.stack.callback(os.close, number)
        return number

    def closed(self):
        return 999_999

    def a_directory(self):
        return self.owned(os.open(self.folder, os.O_RDONLY))

    def a_file(self, flags):
        return self.owned(os.open(self.folder / "file", flags | os.O_CREAT))

    def a_path(self):
        self.a_file(os.O_WRONLY)
        return self.owned(os.open(self.folder / "file", os.O_PATH))

    def a_fifo(self):
        os.mkfifo(self.folder / "fifo")
        return self.owned(os.open(self.folder / "fifo", os.O_RDWR))

    def a_pipe(self, which):
        return [self.owned(end) for end in os.pipe()][which]

    def epoll(self):
        return self.stack.enter_context(select.epoll()).fileno()

    def a_socket(self, family=socket.AF_UNIX, kind=socket.SOCK_STREAM):
        return self.stack.enter_context(socket.socket(family, kind)).fileno()

    def of_a_pair(self, kind):
        ends = [self.stack.enter_context(end) for end in socket.socketpair(type=kind)]
        return ends[0].fileno()

    def listening(self):
        self.door = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return self.door.fileno()

    def connected(self):
        self.listening()
        made = socket.create_connection(self.door.getsockname())
        return self.stack.enter_context(made).fileno()


MADE = {
    "closed": Maker.closed,
    "a directory": Maker.a_directory,
    "O_PATH": Maker.a_path,
    "read-only": lambda make: make.a_file(os.O_RDONLY),
    "write-only": lambda make: make.a_file(os.O_WRONLY),
    "both ways": lambda make: make.a_file(os.O_RDWR),
    "a device": lambda make: make.owned(os.open("/dev/null", os.O_RDWR)),
    "a FIFO": Maker.a_fifo,
    "a pipe to read": lambda make: make.a_pipe(0),
    "a pipe to write": lambda make: make.a_pipe(1),
    "epoll": Maker.epoll,
    "an eventfd": lambda make: make.owned(os.eventfd(0)),
    "not connected": Maker.a_socket,
    "not connected, TCP": lambda make: make.a_socket(socket.AF_INET),
    "datagrams": lambda make: make.of_a_pair(socket.SOCK_DGRAM),
    "packets": lambda make: make.of_a_pair(socket.SOCK_SEQPACKET),
    "listening": Maker.listening,
    "connected": Maker.connected,
    "one of a pair": lambda make: make.of_a_pair(socket.SOCK_STREAM),
}
ABSENT = "File descriptor named '{}' has not been found"
NO_FILE = "Invalid file descriptor {}: it is neither a socket nor a pipe, file or device"
NOT_CONNECTED = "Invalid file descriptor {}: it is a socket that is not connected"
NO_STREAM = "Invalid file descriptor {}: it is a socket of another type than SOCK_STREAM"
NOT_WRITABLE = "Invalid file descriptor {}: it is not open to be written to"
NOT_READABLE = "Invalid file descriptor {}: it is not open to be read from"
REFUSED = {
    "closed": (ABSENT, ABSENT),
    "a directory": ("Invalid file descriptor {}: it is a directory",) * 2,
    "O_PATH": (
        "Invalid file descriptor {}: it was opened with O_PATH, so it can be neither read nor written",
    )
    * 2,
    "read-only": (NOT_WRITABLE, None),
    "write-only": (None, NOT_READABLE),
    "a pipe to read": (NOT_WRITABLE, None),
    "a pipe to write": (None, NOT_READABLE),
    "epoll": (NO_FILE, NO_FILE),
    "an eventfd": (NO_FILE, NO_FILE),
    "not connected": (NOT_CONNECTED, NOT_CONNECTED),
    "not connected, TCP": (NOT_CONNECTED, NOT_CONNECTED),
    "datagrams": (NO_STREAM, NO_STREAM),
    "packets": (NO_STREAM, NO_STREAM),
    "listening": (NOT_CONNECTED, None),
}
"""What is said to who sends, and to who receives; None: it will do."""

ANSWERS = {"a device", "not connected", "not connected, TCP", "connected", "one of a pair"}
ANSWERS |= {"datagrams", "packets", "listening"}
"""What both ways can be made of; those that no stream goes through are refused before."""


@pytest.fixture
def given(request, tmp_path):
    maker = Maker(tmp_path)
    with maker.stack:
        yield request.param, MADE[request.param](maker)


@pytest.mark.parametrize("use", Use)
@pytest.mark.parametrize("given", MADE, indirect=True)
def test_what_can_be_used(given, use):
    name, number = given
    text = REFUSED.get(name, (None, None))[use is Use.RECEIVE]
    if text is None:
        check_descriptor(number, use)
        return
    with pytest.raises(Refused) as refused:
        check_descriptor(number, use)
    assert str(refused.value) == text.format(number)


@pytest.mark.parametrize("given", sorted(MADE.keys() - {"closed"}), indirect=True)
def test_what_can_answer(given):
    name, number = given
    assert can_answer(number) is (name in ANSWERS)
