"""A host that does not answer is not waited for longer than anybody wants it."""

import threading

import pytest

from postcopy.channel.address import parse
from postcopy.errors import ChannelBroken, MigrationCancelled
from postcopy.source import connector
from postcopy.source.user_requests import UserRequests

NOWHERE = parse("tcp:127.0.0.1:1")


class Late:
    """A channel that comes when nobody waits for it any more."""

    def __init__(self):
        self.go, self.closed = threading.Event(), threading.Event()

    def connect(self, _):
        assert self.go.wait(10)
        return self

    def shutdown(self):
        """Nothing waits on it."""

    def close(self):
        self.closed.set()


@pytest.fixture
def late(monkeypatch):
    made = Late()
    monkeypatch.setattr(connector, "connect", made.connect)
    yield made
    made.go.set()


def test_until_the_user_gives_up(late):
    requests = UserRequests()
    threading.Timer(0.01, requests.cancel).start()
    with pytest.raises(MigrationCancelled):
        connector.Connector(requests).connect(NOWHERE)
    late.go.set()
    assert late.closed.wait(10)


def test_until_the_first_connection_breaks_and_with_it_the_need_of_a_second(late):
    requests, broken = UserRequests(), threading.Event()

    def break_it():
        broken.set()
        requests.interrupt.set()

    threading.Timer(0.01, break_it).start()
    with pytest.raises(ChannelBroken, match="the first connection broke before the second"):
        connector.Connector(requests).connect(NOWHERE, broken.is_set)
    late.go.set()
    assert late.closed.wait(10)


def test_and_not_at_all_if_that_was_so_before(late):
    with pytest.raises(ChannelBroken):
        connector.Connector(UserRequests()).connect(NOWHERE, lambda: True)


def test_who_comes_in_time_is_taken(late):
    late.go.set()
    assert connector.Connector(UserRequests()).connect(NOWHERE) is late
    assert not late.closed.is_set()
