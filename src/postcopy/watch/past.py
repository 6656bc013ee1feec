"""The samples of a whole run in bounded room: a run that lasts long is kept in larger steps.

Each sample has its number.  Kept are those that the step divides, those at which the status changed, and
the newest.  When there are too many the step doubles: so what is kept depends only on what has come, and
who comes late gets what those have who have been there from the start.
"""

from collections.abc import Iterable
from typing import Final

from postcopy.watch.sample import Sample

MOST_SAMPLES: Final = 7200
_MOST_BYTES: Final = 64 << 20
_MOST_CHANGES: Final = 1000


class Past:
    """Keeps what samples have been made into.

    :param most: how many samples to keep, but for changes of the status.
    """

    def __init__(self, most: int = MOST_SAMPLES, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: list[tuple[int, bytes]] = []  # by number
        self._bytes = 0
        self._changes: set[int] = set()
        self._status: str | None = None
        self.count = 0
        """How many there have been."""
        self.step = 1
        """Numbers that it does not divide are not kept."""

    def is_change(self, sample: Sample) -> bool:
        """Whether the next sample is one that is kept because of its status."""
        return sample.status != self._status and len(self._changes) < _MOST_CHANGES

    def add(self, sample: Sample, item: bytes) -> None:
        """Keep the next one."""
        if self._kept and not self._stays(self._kept[-1][0]):
            self._bytes -= len(self._kept.pop()[1])
        if self.is_change(sample):
            self._changes.add(self.count)
        self._status = sample.status
        self._kept.append((self.count, item))
        self._bytes += len(item)
        self.count += 1
        while self._is_too_much():
            self.step *= 2
            newest = self._kept[-1]
            self._kept = [each for each in self._kept[:-1] if self._stays(each[0])] + [newest]
            self._bytes = sum(len(each) for _, each in self._kept)

    def _stays(self, number: int) -> bool:
        return number % self.step == 0 or number in self._changes

    def _is_too_much(self) -> bool:
        others = len(self._kept) - len(self._changes)
        return self.step < self.count and (others > self._most or self._bytes > self._most_bytes)

    def since(self, number: int) -> list[bytes]:
        """What is kept from this number on."""
        found = []
        for each, item in reversed(self._kept):
            if each < number:
                break
            found.append(item)
        return found[::-1]


def thinned(samples: Iterable[Sample]) -> list[Sample]:
    """What is kept of a whole run."""
    every, past = list(samples), Past()
    for number, sample in enumerate(every):
        past.add(sample, b"%d" % number)
    return [every[int(number)] for number in past.since(0)]
