"""vCPUs that run for a share of the time alone: ``auto-converge``, and a limit of the dirty rate.

As in QEMU, a vCPU is let run for a slice of 10 ms and held for as long as its percentage says.  Where that
would hold it for longer than 40 ms, the slice is shortened: at 99 % QEMU's vCPUs stand still for a second.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from postcopy.errors import HostCannot, PostcopyError, Refused
from postcopy.guest import Region
from postcopy.kernel import threads

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SLICE_S: Final = 0.010
LONGEST_HOLD_S: Final = 0.040
MOST_PERCENT: Final = 99

_PAGE_BYTES: Final = 4096
_USER: Final = "dirty limit"
_log = logging.getLogger(__name__)


class HeldVcpu(Protocol):
    """A vCPU that can be held."""

    index: int

    def hold(self) -> None:
        """Let it leave the guest, and not come back; does not wait."""

    def release(self) -> None:
        """Let it run again, if it is wanted."""


def slices(percent: float) -> tuple[float, float]:
    """How long a vCPU is let run, and is held then, in seconds.

    :param percent: of the time in which it is held; above 0, and below 100.
    """
    ratio = percent / (100 - percent)
    run_s = min(SLICE_S, LONGEST_HOLD_S / ratio)
    return run_s, run_s * ratio


class VcpuThrottle:
    """Holds the vCPUs of one machine for a share of the time; any thread may call any method.

    Two callers may ask for it, a migration and a limit of the dirty rate: the larger percentage counts.
    """

    def __init__(self, vcpus: Sequence[HeldVcpu]) -> None:
        self._vcpus = vcpus
        self._changed = threading.Condition()
        self._percents: dict[str, float] = {}
        self._runs = False
        self._closed = False

    @property
    def percent(self) -> float:
        """The share of the time in which each vCPU is held; 0: none."""
        return max(self._percents.values(), default=0.0)

    def set(self, percent: float, user: str = "migration") -> None:
        """Hold them for so much of the time from now on, for one caller.

        :param percent: 0 to 99.
        """
        with self._changed:
            self._percents[user] = min(max(percent, 0.0), float(MOST_PERCENT))
            if self.percent and not self._runs and not self._closed:
                thread = threading.Thread(target=self._run, name="throttle", daemon=True)
                threads.start(thread)
                self._runs = True
            self._changed.notify_all()

    def close(self) -> None:
        """Hold none any more, for good."""
        with self._changed:
            self._closed = True
            self._percents = {}
            self._changed.notify_all()

    def _run(self) -> None:
        with self._changed:
            while self.percent:
                run_s, hold_s = slices(self.percent)
                self._changed.wait(run_s)
                for vcpu in self._vcpus if self.percent else ():
                    vcpu.hold()
                until = time.monotonic() + hold_s
                while self.percent and (left_s := until - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                for vcpu in self._vcpus:
                    vcpu.release()
            self._runs = False


class LimitedGuest(Protocol):
    """The guest whose dirty rate is limited."""

    def regions(self) -> Sequence[Region]:
        """Its RAM blocks."""

    def start_dirty_log(self, user: str) -> None:
        """See :meth:`postcopy.machine.machine.Machine.start_dirty_log`."""

    def stop_dirty_log(self, user: str) -> None:
        """Stop noting."""

    def fetch_dirty_log(self, block: str, user: str) -> "npt.NDArray[np.uint8]":
        """Fetch and clear the log of a block."""


@dataclass(slots=True)
class _Limit:
    bytes_per_second: float
    current: float = 0.0
    held: float = 0.0


class DirtyLimit:
    """Holds a guest to a rate at which it writes: ``set-vcpu-dirty-limit``.

    KVM's log does not tell which vCPU has written.  No vCPU writes faster than all of them together: so
    all are held until these together keep to the limit of one.

    :param pause: waits for so many seconds and returns whether the limit has gone; for tests.
    """

    def __init__(
        self,
        guest: LimitedGuest,
        throttle: VcpuThrottle,
        vcpus: Sequence[HeldVcpu],
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        self._guest = guest
        self._throttle = throttle
        self._vcpus = vcpus
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._pause = pause or self._over.wait
        self._limit: _Limit | None = None
        self._period_s = 1.0
        self._runs = False

    def set(self, mebibytes: int, vcpu: int | None = None, period_ms: int = 1000) -> None:
        """Begin to limit, or change the limit.

        :param mebibytes: a second; 0 takes the limit off, as QEMU does.
        :param vcpu: the number of the vCPU; None: each.
        :raises Refused: there is no such vCPU, it cannot be limited alone, or there is no dirty log.
        """
        self._check(vcpu)
        if not mebibytes:
            self.cancel(vcpu)
            return
        if vcpu is not None and len(self._vcpus) > 1:
            raise Refused(
                f"the dirty log does not tell the writes of {len(self._vcpus)} vCPUs apart; set the limit "
                "of all of them (without cpu-index)"
            )
        with self._lock:
            self._period_s = period_ms / 1000
            if self._limit is not None:
                self._limit.bytes_per_second = mebibytes << 20
                return
            if not self._runs:
                self._start_log()
            self._limit = _Limit(mebibytes << 20)
            self._over.clear()
            if not self._runs:
                threads.start(threading.Thread(target=self._run, name="dirty-limit", daemon=True))
                self._runs = True

    def cancel(self, vcpu: int | None = None) -> None:
        """Take the limit off; harmless without one.

        :raises Refused: there is a limit, and no such vCPU.
        """
        with self._lock:
            if self._limit is None:
                return
            self._check(vcpu)
            self._limit = None
            self._over.set()

    def query(self) -> list[Mapping[str, Any]]:
        """The answer to ``query-vcpu-dirty-limit``, in MiB a second; the rate is that of all vCPUs."""
        with self._lock:
            if (limit := self._limit) is None:
                return []
            return [
                {
                    "cpu-index": vcpu.index,
                    "limit-rate": int(limit.bytes_per_second) >> 20,
                    "current-rate": round(limit.current) >> 20,
                }
                for vcpu in self._vcpus
            ]

    def _check(self, vcpu: int | None) -> None:
        if vcpu is not None and not 0 <= vcpu < len(self._vcpus):
            raise Refused("incorrect cpu index specified")

    def _start_log(self) -> None:
        try:
            self._guest.start_dirty_log(_USER)
        except HostCannot as error:
            raise Refused(
                "dirty page limit feature requires KVM with accelerator property 'dirty-ring-size' set' "
                f"({error.what}; run the guest with KVM)"
            ) from error

    def close(self) -> None:
        """Take the limit off; the guest ends."""
        self.cancel()

    def _run(self) -> None:
        while not self._has_ended():
            try:
                self._keep()
            except PostcopyError:
                _log.exception("the dirty rate cannot be limited any more")
                self.cancel()

    def _has_ended(self) -> bool:
        """Whether there is no limit; then all is as before."""
        with self._lock:
            if self._limit is not None:
                return False
            self._runs = False
            self._throttle.set(0, _USER)
            self._guest.stop_dirty_log(_USER)
            return True

    def _keep(self) -> None:
        began = time.monotonic()
        while not self._pause(self._period_s):
            now = time.monotonic()
            elapsed_s, began = max(now - began, self._period_s), now
            self._adjust(self._written() / elapsed_s)

    def _adjust(self, rate: float) -> None:
        with self._lock:
            if (limit := self._limit) is None:
                return
            limit.current = rate
            limit.held = next_percent(limit.held, rate, limit.bytes_per_second)
            self._throttle.set(limit.held, _USER)

    def _written(self) -> int:
        import numpy as np

        logs = [self._guest.fetch_dirty_log(each.name, _USER) for each in self._guest.regions()]
        return sum(int(np.unpackbits(log).sum()) for log in logs) * _PAGE_BYTES


def next_percent(held: float, rate: float, limit: float) -> float:
    """The share of the time in which vCPUs are held from now on.

    What they write is taken to be in proportion to the time that they run.

    :param held: the share until now; ``rate``: what they wrote a second; ``limit``: what they may.
    """
    runs = (100 - held) * limit / max(rate, 1)
    # Slowly back: a guest that pauses for a moment is not let loose at once.
    return float(min(max(100 - min(runs, (100 - held) * 1.5), 0), MOST_PERCENT))
