"""A background snapshot by itself, without a machine: what its threads do to each other."""

from postcopy.parameters import Capabilities, Parameters
from postcopy.snapshot.background import BackgroundSnapshot
from postcopy.status import Progress, Status


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
    progress = Progress(begin=Status.ACTIVE)
    snapshot = LettingGo(
        None, "file:/nowhere", Capabilities(), Parameters(), progress, lambda _: ""
    )
    snapshot._channel = snapshot
    snapshot.cancel()
    assert snapshot.shut_down == 1
    assert progress.status is Status.CANCELLING
