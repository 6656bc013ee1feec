"""How fast a guest writes to its memory: QEMU's ``calc-dirty-rate``.

Three modes, of QEMU's names.  ``page-sampling`` compares some pages with what they were.  ``dirty-bitmap``
counts the pages in the dirty log.  ``dirty-ring`` tells of each vCPU apart.  KVM's log does not say which
vCPU has written, so that mode is for a guest of one vCPU, and counts in the same log.
"""

import logging
import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from postcopy.errors import HostCannot, PostcopyError, Refused, WrongState
from postcopy.guest import Region, VcpuThread
from postcopy.kernel import threads

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PAGE_SAMPLING, DIRTY_RING, DIRTY_BITMAP = "page-sampling", "dirty-ring", "dirty-bitmap"
MODES: Final = (PAGE_SAMPLING, DIRTY_RING, DIRTY_BITMAP)
MILLISECONDS: Final = {"second": 1000, "millisecond": 1}
"""The units of a measurement's time."""

_DEFAULT_SAMPLES: Final = 512
_FEWEST_SAMPLES: Final = 128
_USER: Final = "dirty rate"
_PAGE_BYTES: Final = 4096
_log = logging.getLogger(__name__)


class MeasuredGuest(Protocol):
    """What is measured."""

    def regions(self) -> Sequence[Region]:
        """Its RAM blocks."""

    @property
    def vcpus(self) -> Sequence[VcpuThread]:
        """Its vCPUs."""

    def start_dirty_log(self, user: str) -> None:
        """See :meth:`postcopy.machine.machine.Machine.start_dirty_log`."""

    def stop_dirty_log(self, user: str) -> None:
        """Stop noting."""

    def fetch_dirty_log(self, block: str, user: str) -> "npt.NDArray[np.uint8]":
        """Fetch and clear the log of a block."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be measured.

    :ivar unit: of ``time``, a key of :data:`MILLISECONDS`.
    :ivar samples: pages for each GiB, for ``page-sampling`` alone; None: 512.
    """

    time: int
    unit: str = "second"
    samples: int | None = None
    mode: str = PAGE_SAMPLING

    @property
    def milliseconds(self) -> int:
        """How long is measured."""
        return self.time * MILLISECONDS[self.unit]

    def check(self) -> None:
        """Refuse what QEMU refuses, in its words.

        :raises Refused: a number is out of range, or does not belong to the mode.
        """
        if not 50 <= self.milliseconds <= 60000:
            raise Refused("Calculation time is out of range [50ms, 60000ms].")
        if self.samples is None:
            return
        if self.mode != PAGE_SAMPLING:
            raise Refused("sample-pages is used only in page-sampling mode")
        if not 128 <= self.samples <= 16384:
            raise Refused("sample-pages is out of range[128, 16384].")


class _Samples:
    """The checksums of some pages; those of holes are None, and reading one leaves it a hole."""

    def __init__(self, regions: Sequence[Region], per_gib: int) -> None:
        self._regions = regions
        self._pages = [
            sorted(random.sample(range(count), min(count, max(_FEWEST_SAMPLES, wanted))))
            for count, wanted in (
                (region.size_bytes // _PAGE_BYTES, per_gib * region.size_bytes >> 30)
                for region in regions
            )
        ]
        self._sums = self._read()

    def _read(self) -> list[list[int]]:
        return [
            # Not by a mapping: there a hole would be filled, and a protected page would fault.
            [
                zlib.crc32(os.pread(region.fd, _PAGE_BYTES, region.fd_offset + page * _PAGE_BYTES))
                for page in pages
            ]
            for region, pages in zip(self._regions, self._pages, strict=True)
        ]

    def written_bytes(self) -> float:
        """About how much has been written since."""
        total = 0.0
        for region, before, now in zip(self._regions, self._sums, self._read(), strict=True):
            changed = sum(a != b for a, b in zip(before, now, strict=True))
            total += region.size_bytes * changed / len(before)
        return total


class DirtyRate:
    """The measurements of one guest, one at a time; any thread may call any method.

    :param pause: waits for so many seconds and returns whether the measurement is given up; for tests.
    """

    def __init__(self, guest: MeasuredGuest, pause: Callable[[float], bool] | None = None) -> None:
        self._guest = guest
        self._closed = threading.Event()
        self._pause = pause or self._closed.wait
        self._lock = threading.Lock()
        self._order: Order | None = None
        self._status = "unstarted"
        self._began = 0.0
        self._mebibytes_per_second = 0

    def start(self, order: Order) -> None:
        """Begin to measure, and return.

        :raises WrongState: a measurement is under way.
        :raises Refused: see :meth:`Order.check`; or this guest cannot be measured so.
        """
        with self._lock:
            if self._status == "measuring":
                raise WrongState("the dirty rate is already being measured.")
            order.check()
            finish = self._begin(order)
            self._order, self._status, self._began = order, "measuring", time.time()
            thread = threading.Thread(
                target=self._measure, args=(order, finish), name="dirty-rate", daemon=True
            )
            threads.start(thread)

    def query(self, unit: str = "second") -> dict[str, Any]:
        """The answer to ``query-dirty-rate``; ``dirty-rate`` is in MiB a second.

        :param unit: of the member ``calc-time``.
        """
        with self._lock:
            order = self._order
            mode = PAGE_SAMPLING if order is None else order.mode
            answer: dict[str, Any] = {
                "status": self._status,
                "sample-pages": 0 if order is None else _samples(order),
                "mode": mode,
                "calc-time-unit": unit,
                "start-time": int(self._began),
                "calc-time": 0 if order is None else order.milliseconds // MILLISECONDS[unit],
            }
            if self._status == "measured":
                answer["dirty-rate"] = rate = self._mebibytes_per_second
                if mode == DIRTY_RING:
                    answer["vcpu-dirty-rate"] = [
                        {"id": vcpu.index, "dirty-rate": rate} for vcpu in self._guest.vcpus
                    ]
        return answer

    def close(self) -> None:
        """Give up what is being measured; the guest ends."""
        self._closed.set()

    def _begin(self, order: Order) -> Callable[[], float]:
        """Look for the first time; return what looks for the second, and tells the bytes written."""
        if order.mode == PAGE_SAMPLING:
            return _Samples(self._guest.regions(), _samples(order)).written_bytes
        refusal = f"mode {order.mode} is not enabled, use other method instead."
        vcpus = len(self._guest.vcpus)
        if order.mode == DIRTY_RING and vcpus != 1:
            raise Refused(f"{refusal} KVM's log does not tell the writes of {vcpus} vCPUs apart.")
        try:
            self._guest.start_dirty_log(_USER)
        except HostCannot as error:
            raise Refused(f"{refusal} {error.what}.") from error
        return self._logged_bytes

    def _logged_bytes(self) -> float:
        import numpy as np

        logs = [self._guest.fetch_dirty_log(each.name, _USER) for each in self._guest.regions()]
        return sum(int(np.unpackbits(log).sum()) for log in logs) * _PAGE_BYTES

    def _measure(self, order: Order, finish: Callable[[], float]) -> None:
        status, rate = "unstarted", 0
        began = time.monotonic()
        try:
            if not self._pause(order.milliseconds / 1000):
                # A busy host may have let us wait longer.
                elapsed_s = max(order.milliseconds / 1000, time.monotonic() - began)
                rate = round(finish() / elapsed_s) >> 20
                status = "measured"
        except (PostcopyError, OSError):
            _log.exception("the dirty rate could not be measured")
        finally:
            if order.mode != PAGE_SAMPLING and not self._closed.is_set():
                self._guest.stop_dirty_log(_USER)
            with self._lock:
                self._status, self._mebibytes_per_second = status, rate


def _samples(order: Order) -> int:
    if order.mode != PAGE_SAMPLING:
        return 0
    return _DEFAULT_SAMPLES if order.samples is None else order.samples
