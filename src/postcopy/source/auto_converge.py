"""Slow a guest down that writes faster than its memory is sent: ``auto-converge`` and ``dirty-limit``.

When to do it, and how much, is QEMU's: over a period the bytes written are compared with those sent.  At
the second period in a row in which they are more than a share of these (``throttle-trigger-threshold``)
the guest is slowed down by a step.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Final, Protocol

from postcopy.errors import PostcopyError
from postcopy.parameters import Capabilities, Capability, Parameters

_PERIOD_S: Final = 0.3
"""Rounds that are shorter are judged together."""

_IN_A_ROW: Final = 2


class SlowedGuest(Protocol):
    """What slows the guest down."""

    def throttle(self, percent: int) -> None:
        """Hold its vCPUs for so much of the time; 0: no more."""

    def limit_dirty_rate(self, mebibytes: int, period_ms: int) -> None:
        """Hold each of its vCPUs to a dirty rate; 0: no more."""


class Convergence:
    """Judges the rounds of one precopy.

    :param capabilities: whether the guest is slowed down at all, and how.
    :param parameters: read anew each time.
    :ivar percent: the share of the time in which the vCPUs are held; 0: none.
    """

    def __init__(
        self,
        guest: SlowedGuest,
        capabilities: Capabilities,
        parameters: Callable[[], Parameters],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._guest = guest
        self._parameters = parameters
        self._limits_rate = capabilities.enabled(Capability.DIRTY_LIMIT)
        self._is_on = self._limits_rate or capabilities.enabled(Capability.AUTO_CONVERGE)
        self._clock = clock
        self.percent = 0
        self._slowed = False
        self._high = 0
        self._began = clock()
        self._sent_bytes = 0
        self._written_bytes = 0

    def round_ended(self, sent_bytes: int, written_bytes: int) -> None:
        """A round has sent so much, and the guest has written so much meanwhile."""
        self._sent_bytes += sent_bytes
        self._written_bytes += written_bytes
        now = self._clock()
        if now - self._began < _PERIOD_S or not self._is_on:
            return
        parameters = self._parameters()
        enough = self._sent_bytes * parameters.throttle_trigger_threshold / 100
        if self._written_bytes > enough:
            self._high += 1
            if self._high >= _IN_A_ROW:
                self._high = 0
                self._slow_down(parameters, enough / self._written_bytes)
        self._began, self._sent_bytes, self._written_bytes = now, 0, 0

    def stop(self) -> None:
        """Let the guest run as before; harmless when it does."""
        if not self._slowed:
            return
        self._slowed, self.percent = False, 0
        with contextlib.suppress(PostcopyError):  # its process lets it run when this one ends
            if self._limits_rate:
                self._guest.limit_dirty_rate(0, 1000)
            else:
                self._guest.throttle(0)

    def _slow_down(self, parameters: Parameters, share: float) -> None:
        self._slowed = True
        if self._limits_rate:
            self._guest.limit_dirty_rate(
                parameters.vcpu_dirty_limit, parameters.x_vcpu_dirty_limit_period
            )
            return
        self.percent = next_percent(parameters, self.percent, share)
        self._guest.throttle(self.percent)


def next_percent(parameters: Parameters, now: int, share: float) -> int:
    """The next step.

    :param now: the percentage so far.
    :param share: what the guest may write, of what it writes.
    """
    if not now:
        return parameters.cpu_throttle_initial
    step = parameters.cpu_throttle_increment
    if parameters.cpu_throttle_tailslow:
        runs = 100 - now
        step = min(int(runs - runs * share), step)
    return min(now + step, parameters.max_cpu_throttle)
