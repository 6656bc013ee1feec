"""Which connections of a source are accepted: the main channel, the preempt channel, and no other."""

import errno
import socket
import threading

import pytest

from postcopy.channel.address import parse
from postcopy.channel.connect import connect
from postcopy.channel.listen import Listener
from postcopy.destination import incoming_channels as module
from postcopy.destination.incoming_channels import IncomingChannels
from postcopy.errors import ChannelBroken, KernelError, StreamError


@pytest.fixture
def address(tmp_path):
    return parse(f"unix:{tmp_path}/door")


def opened(address, *, preempt):
    return IncomingChannels(Listener(address), lambda: preempt)


def test_the_second_connection_is_the_preempt_channel_and_a_third_is_closed(address, capsys):
    channels = opened(address, preempt=True)
    with connect(address) as first, channels.main() as main, connect(address) as second:
        with channels.preempt(10) as preempt, connect(address) as third:
            second.send(b"u")
            first.send(b"m")
            room = memoryview(bytearray(1))
            assert preempt.receive_into(room) == 1
            assert bytes(room) == b"u"
            assert main.receive_into(room) == 1
            assert bytes(room) == b"m"
            assert third.receive_into(room) == 0
        channels.close()
    assert "Extra incoming migration connection; ignoring" in capsys.readouterr().err


def test_where_none_is_wanted_the_second_is_closed(address):
    channels = opened(address, preempt=False)
    with connect(address), channels.main(), connect(address) as second:
        assert second.receive_into(memoryview(bytearray(1))) == 0
        channels.close()


def test_no_second_connection_comes(address):
    channels = opened(address, preempt=True)
    with connect(address), channels.main():
        with pytest.raises(StreamError, match=r"no second connection within 0\.01 s; switch"):
            channels.preempt(0.01)
        channels.close()


def test_a_wait_fails_when_no_connection_can_be_accepted(address, monkeypatch):
    channels = opened(address, preempt=True)
    with connect(address), channels.main():

        def full(_):
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(socket.socket, "accept", full)
        with connect(address), pytest.raises(KernelError, match=r"accept failed: .*ulimit -n"):
            channels.preempt(10)
        channels.close()


def test_giving_up_ends_the_wait(address):
    channels = opened(address, preempt=True)
    with connect(address), channels.main():
        threading.Timer(0.01, channels.give_up).start()
        with pytest.raises(ChannelBroken, match="no longer waiting"):
            channels.preempt(10)
        channels.close()
        channels.close()


def test_a_closed_one_accepts_no_connection(address):
    channels = opened(address, preempt=True)
    channels.close()
    with pytest.raises(ChannelBroken):
        channels.main()


def test_a_preempt_channel_that_was_not_asked_for_is_closed(address):
    channels = opened(address, preempt=True)
    with connect(address), channels.main(), socket.socket(socket.AF_UNIX) as second:
        second.connect(address.path)
        with connect(address) as third:  # closed once the second has been accepted
            assert third.receive_into(memoryview(bytearray(1))) == 0
        channels.close()
        second.settimeout(10)
        assert second.recv(1) == b""


def test_it_may_be_closed_at_the_moment_of_a_connection(address, monkeypatch):
    """The user listens elsewhere, and the source comes that very moment."""
    channels = opened(address, preempt=True)

    class Thread(threading.Thread):
        def start(self):
            channels.close()
            super().start()

    with connect(address):
        monkeypatch.setattr(module.threading, "Thread", Thread)
        channels.main().close()
        monkeypatch.undo()
        channels.close()
