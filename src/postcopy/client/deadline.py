"""Whether a precopy will end in time, as judged each time that it has been through the memory."""

from dataclasses import dataclass
from typing import Final, Literal

from postcopy.client.progress import Phase, Progress

Then = Literal["postcopy", "cancel", "force"]
"""What is done with a precopy that will not end in time: switch over, leave the guest where it is, or stop
it for as long as the rest takes."""

_ROUNDS_IN_A_ROW: Final = 2
_LONGEST_STOP_MS: Final = 2_000_000  # of QEMU's parameter downtime-limit
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a migration is to have ended.

    :ivar within_s: seconds from its beginning.
    :ivar downtime_ms: the longest stop; 0 counts as 1.
    """

    within_s: float
    downtime_ms: int
    then: Then


@dataclass(frozen=True, slots=True)
class Judgement:
    """A precopy that will not end in time.

    :ivar why: for the user.
    :ivar stop_ms: how long the guest would have to be stopped to end it now, with a margin.
    """

    why: str
    stop_ms: int


class DeadlineJudge:
    """Looks at the progress of one migration; judges once.

    Each round sends what the guest has written during the round before.  If it writes at the fraction q of
    the rate at which its memory is sent, what is left shrinks by q each round: the time until the rest can
    be sent within the longest stop is a geometric series, and has no end where q is 1 or more.
    """

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._round = 0
        self._late = 0
        self._judged = False

    def judge(self, progress: Progress) -> Judgement | None:
        """Take the next progress; give a judgement when it is certain that it will not end in time.

        At the end of a round that is so after two rounds in a row, since one may have been disturbed; at
        the deadline itself at once.
        """
        if self._judged or progress.phase is not Phase.PRECOPY:
            return None
        over = progress.elapsed_ms >= 1000 * self._deadline.within_s
        if not over:
            if progress.round <= max(self._round, 1):
                return None
            self._round = progress.round
            left_s = self._deadline.within_s - progress.elapsed_ms / 1000
            in_time = needed_s(progress, self._deadline.downtime_ms) <= left_s
            self._late = 0 if in_time else self._late + 1
            if self._late < _ROUNDS_IN_A_ROW:
                return None
        self._judged = True
        return self._judgement(progress)

    def _judgement(self, progress: Progress) -> Judgement:
        rate = max(progress.rate_bytes, 1)
        rest_ms = progress.remaining_bytes * 1000 // rate
        why = (
            f"{progress.remaining_bytes / _MIB:.0f} MiB are left after {progress.elapsed_ms / 1000:.1f} "
            f"of {self._deadline.within_s:g} s, the guest writes "
            f"{progress.dirty_rate_bytes / _MIB:.0f} MiB/s, and {progress.rate_bytes / _MIB:.0f} MiB/s "
            "are sent"
        )
        stop_ms = self._deadline.downtime_ms + 2 * rest_ms
        return Judgement(why, min(max(stop_ms, 1), _LONGEST_STOP_MS))


def needed_s(progress: Progress, downtime_ms: int) -> float:
    """Estimate how many seconds a precopy takes from the end of a round on; infinite if it has no end."""
    rate, left = progress.rate_bytes, progress.remaining_bytes
    enough = rate * max(downtime_ms, 1) / 1000
    if left <= enough:
        return 0.0
    if not rate:
        return float("inf")
    shrinks, seconds = progress.dirty_rate_bytes / rate, 0.0
    if shrinks >= 1:
        return float("inf")
    while left > enough:
        seconds += left / rate
        left = int(left * shrinks)
    return seconds
