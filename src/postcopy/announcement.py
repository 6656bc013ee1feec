"""When the network is told where a guest is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AnnouncementTimes:
    """How often and when the network is told where a guest is: the parameters ``announce-*``.

    :ivar rounds: how often in all.
    :ivar initial_ms: before the second time; ``step_ms``: so much longer before each further one.
    :ivar max_ms: the longest pause.
    """

    rounds: int
    initial_ms: int
    step_ms: int
    max_ms: int

    def pauses_s(self) -> list[float]:
        """The pause before the second announcement, and before each further one."""
        pauses_ms = (self.initial_ms + n * self.step_ms for n in range(self.rounds - 1))
        return [min(pause_ms, self.max_ms) / 1000 for pause_ms in pauses_ms]
