"""A background snapshot by itself, without a machine: what its threads do to each other."""

import pytest

from fakes.cpus import CpusNoted
from postcopy.errors import KernelError
from postcopy.parameters import Capabilities, Parameters
from postcopy.snapshot import background
from postcopy.snapshot.background import BackgroundSnapshot
from postcopy.status import Status, StatusMachine


class LettingGo(BackgroundSnapshot):
    """Its own thread lets go of the channel in the moment in which another has looked for it."""

    shut_down = 0

    @property
    def _channel(self):
        channel, self._seen = self._seen, None
        return channel

    @_channel.setter
    def _channel(self, channel):
        self._seen = channel

    def shutdown(self):
        self.shut_down += 1


def test_a_cancel_in_the_moment_of_its_end_does_not_fail():
    progress = StatusMachine(begin=Status.ACTIVE)
    snapshot = LettingGo(
        None, "file:/nowhere", Capabilities(), Parameters(), progress, lambda _: ""
    )
    snapshot._channel = snapshot
    snapshot.cancel()
    assert snapshot.shut_down == 1
    assert progress.status is Status.CANCELLING


class Frozen:
    """A guest and a guard that say when they are asked for something, and may fail at it."""

    def __init__(self, calls, *, fails):
        self._calls = calls
        self._fails = fails

    def pause_and_save(self):
        self._calls.append("stop")
        if self._fails:
            raise KernelError("read", 5)
        return []

    def freeze(self):
        self._calls.append("freeze")

    def resume(self):
        self._calls.append("resume")


@pytest.mark.parametrize("fails", [False, True])
def test_cpus_are_kept_awake_while_the_guest_stands_still(monkeypatch, fails):
    cpus = CpusNoted()
    monkeypatch.setattr(background, "CpusAwake", lambda: cpus)
    guest = Frozen(cpus.calls, fails=fails)
    snapshot = BackgroundSnapshot(
        guest, "file:/nowhere", Capabilities(), Parameters(), StatusMachine(), lambda _: ""
    )
    if fails:
        with pytest.raises(KernelError):
            snapshot._freeze(guest)
    else:
        snapshot._freeze(guest)
    frozen = [] if fails else ["freeze"]
    assert cpus.calls == ["a while", "stop", *frozen, "resume", "close"]
