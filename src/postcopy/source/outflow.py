"""What has gone out over one channel: counted, and kept to the bandwidth limit."""

from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import Interrupt, RateLimiter
from postcopy.source.counters import Counters, Rate


class Outflow:
    """What every way of sending pages shares; one thread at a time.

    :param limiter: shared with whoever else sends under the same limit.
    """

    def __init__(self, channel: Channel, limiter: RateLimiter, counters: Counters) -> None:
        self._channel = channel
        self._limiter = limiter
        self._counters = counters
        self._unpaced_bytes = 0
        self.sent_bytes = 0
        self._counted_bytes = channel.sent_bytes
        self.rate = Rate()
        self.phase = "precopy_bytes"

    @property
    def limit(self) -> int:
        """The bandwidth limit now, in bytes a second; 0 = none."""
        return self._limiter.bytes_per_second

    def say(self, command: bytes) -> None:
        """Send a command behind the pages."""
        self._channel.send(command)

    def pace(self, interrupt: Interrupt) -> None:
        """Sleep as long as the bandwidth limit wants it, unless interrupted."""
        spent, self._unpaced_bytes = self._unpaced_bytes, 0
        self._limiter.wait(spent, interrupt)
        self.count()

    def count(self) -> None:
        """Bring the counters up to what the channel has sent."""
        sent = self._channel.sent_bytes - self._counted_bytes
        self._counted_bytes += sent
        self.rate.add(sent)
        setattr(self._counters, self.phase, getattr(self._counters, self.phase) + sent)

    def _spent(self, sent_bytes: int) -> int:
        """Note what pages have taken; return it."""
        self._unpaced_bytes += sent_bytes
        self.sent_bytes += sent_bytes
        return sent_bytes
