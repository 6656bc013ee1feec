"""Status and progress of a migration; the progress never decreases."""

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from postcopy.status import Status

_WINDOW_MS: Final = 1000


def status_of(answer: Mapping[str, Any]) -> Status | str:
    """Return the status in an answer to ``query-migrate``; a ``str`` if this client does not know it."""
    name = answer.get("status", Status.NONE.value)
    try:
        return Status(name)
    except ValueError:
        return str(name)


def name_of(status: Status | str) -> str:
    """Return QEMU's name of a status."""
    return status.value if isinstance(status, Status) else status


class Phase(enum.StrEnum):
    """The phases of a migration, or of a snapshot, for a user."""

    SETUP = "setup"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    POSTCOPY = "postcopy"
    PAUSED = "paused"
    RECOVERY = "recovery"
    SAVING = "saving"
    DIGESTS = "digests"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILING = "failing"
    FAILED = "failed"


PHASES: Final = {
    Status.NONE: Phase.SETUP,
    Status.SETUP: Phase.SETUP,
    Status.WAIT_UNPLUG: Phase.SETUP,
    Status.ACTIVE: Phase.PRECOPY,
    Status.COLO: Phase.PRECOPY,
    Status.PRE_SWITCHOVER: Phase.SWITCHOVER,
    Status.DEVICE: Phase.SWITCHOVER,
    Status.POSTCOPY_DEVICE: Phase.SWITCHOVER,
    Status.POSTCOPY_ACTIVE: Phase.POSTCOPY,
    Status.POSTCOPY_RECOVER: Phase.RECOVERY,
    Status.POSTCOPY_RECOVER_SETUP: Phase.RECOVERY,
    Status.POSTCOPY_PAUSED: Phase.PAUSED,
    Status.CANCELLING: Phase.CANCELLING,
    Status.COMPLETED: Phase.COMPLETED,
    Status.CANCELLED: Phase.CANCELLED,
    Status.FAILING: Phase.FAILING,
    Status.FAILED: Phase.FAILED,
}

STOPPED: Final = frozenset({Phase.COMPLETED, Phase.CANCELLED, Phase.FAILED, Phase.PAUSED})
"""Phases that the migration does not leave by itself."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a migration at one moment.

    ``fraction``, ``transferred_bytes``, ``round`` and ``elapsed_ms`` never decrease.
    ``remaining_bytes`` may grow in precopy, since the guest goes on writing.

    :ivar status: a ``str`` for a status that this client does not know; ``phase`` is then the one before,
        or its successor if the migration had stopped.
    :ivar fraction: 0 to 1; 1 only when it has completed.
    :ivar round: the precopy pass under way, from 1 on; 0 before the first.
    :ivar rate_bytes: sent per second, over the last second.
    :ivar dirty_rate_bytes: what the guest wrote per second in the last round.
    :ivar faults_per_s: pages that the destination requested, over the last second.
    """

    phase: Phase
    status: Status | str
    elapsed_ms: int
    fraction: float
    round: int
    transferred_bytes: int
    remaining_bytes: int
    total_bytes: int
    rate_bytes: int
    dirty_rate_bytes: int
    faults: int
    faults_per_s: int

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self) | {
            "phase": self.phase.value,
            "status": name_of(self.status),
            "fraction": round(self.fraction, 4),
        }


class ProgressTracker:
    """Makes :class:`Progress` of successive answers to ``query-migrate``.

    :param postcopy_planned: precopy is then the first half of the progress.
    """

    def __init__(self, *, postcopy_planned: bool = False) -> None:
        self._first_round_share = 0.5 if postcopy_planned else 0.9
        self._samples: deque[tuple[int, int, int]] = deque()
        self._fraction = 0.0
        self._round = 0
        self._transferred = 0
        self._elapsed_ms = 0
        self._left_at_switchover: int | None = None
        self._phase = Phase.SETUP

    def take(self, answer: Mapping[str, Any]) -> Progress:
        """Process one answer; a member that is missing keeps its value."""
        status = status_of(answer)
        phase = self._phase = self._phase_of(status)
        ram = answer.get("ram", {})
        self._elapsed_ms = max(self._elapsed_ms, answer.get("total-time", 0))
        self._transferred = max(self._transferred, ram.get("transferred", 0))
        self._round = max(self._round, ram.get("dirty-sync-count", 0))
        faults = ram.get("postcopy-requests", 0)
        rate, faults_per_s = self._rates(faults)
        remaining, total = ram.get("remaining", 0), ram.get("total", 0)
        self._advance(phase, remaining, total)
        return Progress(
            phase=phase,
            status=status,
            elapsed_ms=self._elapsed_ms,
            fraction=self._fraction,
            round=self._round,
            transferred_bytes=self._transferred,
            remaining_bytes=remaining,
            total_bytes=total,
            rate_bytes=rate,
            dirty_rate_bytes=ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096),
            faults=faults,
            faults_per_s=faults_per_s,
        )

    def _phase_of(self, status: Status | str) -> Phase:
        if isinstance(status, Status):
            return PHASES[status]
        if self._phase is Phase.PAUSED:
            return Phase.RECOVERY
        return Phase.SETUP if self._phase in STOPPED else self._phase

    def _rates(self, faults: int) -> tuple[int, int]:
        samples = self._samples
        samples.append((self._elapsed_ms, self._transferred, faults))
        while samples[-1][0] - samples[0][0] > _WINDOW_MS:
            samples.popleft()
        first, last = samples[0], samples[-1]
        span_ms = last[0] - first[0]
        if not span_ms:
            return 0, 0
        return (last[1] - first[1]) * 1000 // span_ms, max(0, last[2] - first[2]) * 1000 // span_ms

    def _advance(self, phase: Phase, remaining: int, total: int) -> None:
        """Estimate the fraction; only the first round and postcopy can be estimated."""
        if phase is Phase.COMPLETED:
            self._fraction = 1.0
        elif total and phase is Phase.PRECOPY and self._round <= 1:
            self._reach(self._first_round_share * (1 - remaining / total))
        elif total and phase is Phase.POSTCOPY:
            if self._left_at_switchover is None:
                self._left_at_switchover = max(1, remaining)
            gone = 1 - remaining / self._left_at_switchover
            self._reach(min(0.999, self._first_round_share + (1 - self._first_round_share) * gone))

    def _reach(self, fraction: float) -> None:
        self._fraction = max(self._fraction, fraction)
