"""Who comes through the door: the main channel, the one for urgent pages, and nobody else."""

import errno
import socket
import threading

import pytest

from postcopy.channel.address import parse
from postcopy.channel.connect import connect
from postcopy.channel.listen import Listener
from postcopy.destination import door as module
from postcopy.destination.door import Door
from postcopy.errors import ChannelBroken, KernelError, StreamError


@pytest.fixture
def address(tmp_path):
    return parse(f"unix:{tmp_path}/door")


def opened(address, *, urgent):
    return Door(Listener(address), lambda: urgent)


def test_the_second_connection_is_the_urgent_one_and_a_third_is_turned_away(address, capsys):
    door = opened(address, urgent=True)
    with connect(address) as first, door.main() as main, connect(address) as second:
        with door.urgent(10) as urgent, connect(address) as third:
            second.send(b"u")
            first.send(b"m")
            room = memoryview(bytearray(1))
            assert urgent.receive_into(room) == 1
            assert bytes(room) == b"u"
            assert main.receive_into(room) == 1
            assert bytes(room) == b"m"
            assert third.receive_into(room) == 0
        door.close()
    assert "Extra incoming migration connection; ignoring" in capsys.readouterr().err


def test_where_none_is_wanted_the_second_is_turned_away(address):
    door = opened(address, urgent=False)
    with connect(address), door.main(), connect(address) as second:
        assert second.receive_into(memoryview(bytearray(1))) == 0
        door.close()


def test_nobody_comes(address):
    door = opened(address, urgent=True)
    with connect(address), door.main():
        with pytest.raises(StreamError, match=r"no second connection within 0\.01 s; switch"):
            door.urgent(0.01)
        door.close()


def test_who_waits_is_told_that_nobody_can_be_let_in(address, monkeypatch):
    door = opened(address, urgent=True)
    with connect(address), door.main():

        def full(_):
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(socket.socket, "accept", full)
        with connect(address), pytest.raises(KernelError, match=r"accept failed: .*ulimit -n"):
            door.urgent(10)
        door.close()


def test_giving_up_wakes_who_waits(address):
    door = opened(address, urgent=True)
    with connect(address), door.main():
        threading.Timer(0.01, door.give_up).start()
        with pytest.raises(ChannelBroken, match="no longer waiting"):
            door.urgent(10)
        door.close()
        door.close()


def test_a_closed_door_lets_nobody_in(address):
    door = opened(address, urgent=True)
    door.close()
    with pytest.raises(ChannelBroken):
        door.main()


def test_an_urgent_connection_that_nobody_fetched_is_closed(address):
    door = opened(address, urgent=True)
    with connect(address), door.main(), socket.socket(socket.AF_UNIX) as second:
        second.connect(address.path)
        with door._changed:
            assert door._changed.wait_for(lambda: door._urgent is not None, 10)
        door.close()
        second.settimeout(10)
        assert second.recv(1) == b""


def test_it_may_be_closed_in_the_moment_in_which_it_has_let_somebody_in(address, monkeypatch):
    """The user listens elsewhere, and the source comes that very moment."""
    door = opened(address, urgent=True)

    class Thread(threading.Thread):
        def start(self):
            door.close()
            super().start()

    with connect(address):
        monkeypatch.setattr(module.threading, "Thread", Thread)
        door.main().close()
        monkeypatch.undo()
        door.close()
