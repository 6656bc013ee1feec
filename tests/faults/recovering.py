"""A postcopy that is broken, in any way, and gone on with until the guest has arrived."""

from fakes.pair import NEVER_ENDS, POSTCOPY, Side, hammer
from fakes.waiting import wait_until
from faults.fault_channel import FaultChannel
from postcopy.errors import PostcopyError, WrongState
from postcopy.status import ENDED, Status

DEADLINE_S = 20.0
LASTS = NEVER_ENDS | {"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 1 << 20}
"""Postcopy takes many seconds, so that there is something to break; :meth:`Recovering.hurry` ends it.

A round of precopy takes as long.  A busy host may stop this process, and with it the guest, for more
than the half second of a quicker one before it orders the switch: nothing would be left to switch for.
"""
WITH_ROUNDS = LASTS | {"max-bandwidth": NEVER_ENDS["max-bandwidth"]}
"""For who waits for a round, and takes it if precopy completes."""

SETTLED = ENDED | {Status.POSTCOPY_PAUSED}


def small():
    """A guest whose pages move in a moment, and which goes on writing to half of them."""
    return hammer(64, fill_kib=8192)


def broken_journey(make, **more):
    """A journey for :class:`Recovering`."""
    made = {"workload": small(), "capabilities": POSTCOPY, "parameters": LASTS} | more
    return make(made.pop("workload"), **made)


class Recovering:
    """One journey with its fault channels; each recovery gets another address and channel."""

    def __init__(self, trip, folder):
        self.trip = trip
        self.folder = folder
        self.channels = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for channel in self.channels:
            channel.close()

    @property
    def source(self) -> Side:
        return self.trip.source

    @property
    def destination(self) -> Side:
        return self.trip.destination

    def channel(self, target) -> FaultChannel:
        """Another channel, in front of ``target``."""
        number = len(self.channels)
        made = FaultChannel(f"unix:{self.folder}/channel-{number}", target)
        self.channels.append(made)
        return made

    def start(self) -> FaultChannel:
        """Begin to migrate, through a channel."""
        channel = self.channel(self.destination.listen())
        self.source.control.migrate(channel.uri)
        return channel

    def switch(self):
        """Postcopy from now on."""
        self.source.control.start_postcopy()

    def until_postcopy(self):
        self.switch()
        self.source.wait(Status.POSTCOPY_ACTIVE)
        self.destination.wait(Status.POSTCOPY_ACTIVE)

    def until_settled(self):
        """Both sides have ended, or wait for a recovery."""
        sides = (self.source, self.destination)
        wait_until(
            lambda: all(side.status in SETTLED for side in sides),
            DEADLINE_S,
            lambda: f"both settled: {self.story()}; {[side.story() for side in sides]}",
        )

    def settle_or_go_on(self) -> bool:
        """Wait until both sides have settled, or go on by themselves; return whether they do.

        The successor of a destination's engine may find the connection that was on its way to that.
        """
        sides = (self.source, self.destination)

        def going_on():
            return all(
                side.engine is not None and side.status is Status.POSTCOPY_ACTIVE for side in sides
            )

        wait_until(
            lambda: going_on() or all(side.status in SETTLED for side in sides),
            DEADLINE_S,
            lambda: f"settled or going on: {self.story()}; {[side.story() for side in sides]}",
        )
        return not all(side.status in SETTLED for side in sides)

    def meet_again(self, uri=None) -> str:
        """As :meth:`listen_again`; a connection that has come late may have to break first."""
        for _ in range(8):
            try:
                return self.listen_again(uri)
            except WrongState:
                self.until_settled()
        raise AssertionError(f"the destination does not listen: {self.story()}")

    def listen_again(self, uri=None) -> str:
        """``migrate-recover``; return where to go."""
        uri = uri or f"unix:{self.folder}/again-{len(self.channels)}"
        self.destination.control.recover(uri)
        where = self.destination.control.info().socket_address[0]
        return f"tcp:{where['host']}:{where['port']}" if where["type"] == "inet" else uri

    def resume(self, uri=None) -> FaultChannel:
        """Recover both sides, through another channel."""
        channel = self.channel(self.listen_again(uri))
        self.source.control.migrate(channel.uri, resume=True)
        return channel

    def recover(self):
        """Recover until it works: whatever else breaks meanwhile is recovered too."""
        refused = []
        for _ in range(8):
            self.until_settled()
            if self.destination.status is Status.COMPLETED:
                return
            try:
                self.resume()
            except PostcopyError as error:
                refused.append(str(error))  # an engine died of it: the next time there is another
                continue
            wait_until(lambda: self.source.status in SETTLED, DEADLINE_S, "the recovery")
        stories = f"{self.source.story()}; {self.destination.story()}"
        raise AssertionError(f"{self.story()}; {stories}; refused: {refused}")

    def hurry(self):
        """Push without a limit from now on."""
        self.source.set(parameters={"max-postcopy-bandwidth": 0})

    def check_running_here_only(self, side):
        """This side runs the guest, and the other does not."""
        other = self.destination if side is self.source else self.source
        wait_until(lambda: side.machine.running, DEADLINE_S, "nobody runs the guest")
        assert side.machine.owned
        assert not other.machine.running
        assert not other.machine.owned

    def verify(self, side):
        """One owner, and every page right."""
        self.check_running_here_only(side)
        self.trip.verify(side)

    def story(self):
        return f"source {self.source.status.value}: {self.source.error}; destination " + (
            f"{self.destination.status.value}: {self.destination.error}"
        )
