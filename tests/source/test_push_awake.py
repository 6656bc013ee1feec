"""The source's CPUs are kept awake while the destination asks for pages."""

import pytest

from fakes.cpus import CpusNoted
from postcopy.errors import StreamError
from postcopy.source import push as pushing
from postcopy.source.counters import Counters
from postcopy.source.flow_control import PushPolicy
from postcopy.source.push import PostcopyPush


class Block:
    """The pages of a block, all of which have been sent."""

    def __init__(self, calls):
        self.block = self
        self.name = "ram"
        self.page_size_bytes = 4096
        self._calls = calls

    def take(self, first, end):
        self._calls.append(f"take {first} to {end}")
        return []

    def scan_window(self, first):
        pass


class Dirty:
    """What is pending, of one block."""

    def __init__(self, calls):
        self.blocks = [Block(calls)]


@pytest.fixture
def cpus(monkeypatch):
    noted = CpusNoted()
    monkeypatch.setattr(pushing, "CpusAwake", lambda: noted)
    return noted


def test_from_before_the_stop_on_for_each_request_until_the_connection_ends(cpus):
    push = PostcopyPush(Dirty(cpus.calls), None, Counters(), PushPolicy())
    push.expect()
    cpus.calls.append("the guest stops")
    push.begin()
    for page in (3, 8):
        push.serve("ram", page * 4096, 4096)
    push.stop()
    served = ["a while", "take 3 to 4", "a while", "take 8 to 9"]
    assert cpus.calls == ["a while", "the guest stops", "a while", *served, "close"]


def test_not_for_who_may_not_ask_yet(cpus):
    push = PostcopyPush(Dirty(cpus.calls), None, Counters(), PushPolicy())
    with pytest.raises(StreamError, match="before it can miss one"):
        push.serve("ram", 0, 4096)
    assert cpus.calls == []
