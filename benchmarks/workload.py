"""The measuring guest: its image with parameters in it, the records it keeps, the check of its memory.

``guest/README.md`` has the layout.  A :class:`Records` needs only something that reads guest
memory, so that one and the same code looks into every engine's guest.
"""

import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.clock import rdtsc

MIB: Final = 1 << 20
HOT_SET_AT: Final = 16 * MIB

_GUEST = Path(__file__).resolve().parent / "guest"
_SECTOR_BYTES: Final = 512
_DISK_BYTES: Final = MIB
_PARAMETERS = struct.Struct("<8s31Q")
_PARAMETERS_IN_IMAGE: Final = 0x40
_STATE_AT: Final = 0x7100
_STATE = struct.Struct("<8s13Q")
_ITERATIONS, _LAST_TSC = 0x10, 0x28
_SEED: Final = 0x9E3779B97F4A7C15
_SERIES_RING: Final = (0x20000, 8192)
_EVENT_RING: Final = (2 * MIB, 262144)
"""Not at 1 MiB: there our machine has page directories if its memory is above 4 GiB."""
_EVENT_THRESHOLD_S: Final = 10e-6
_SERIES_INTERVAL_S: Final = 10e-3
_STRIDE: Final = 4096
_RUNNING: Final = 2

Words = npt.NDArray[np.uint64]


class Memory(Protocol):
    """Guest memory as someone outside sees it."""

    def read(self, address: int, n_bytes: int) -> bytes:
        """Read, without stopping the guest; OSError where a page is missing."""
        ...


@dataclass(frozen=True)
class Workload:
    """What the guest does.  Its hot set begins at 16 MiB, the incompressible fill behind it.

    :param write_fraction: of all visits, how many write.
    :param stride_bytes: from one page of the hot set that is visited to the next; a power of two.
    :param fill_first: the fill begins at 16 MiB, the hot set behind it.
    """

    hot_bytes: int
    fill_bytes: int
    random: bool
    write_fraction: float = 1.0
    stride_bytes: int = _STRIDE
    fill_first: bool = False

    @property
    def hot_at(self) -> int:
        """Where the hot set begins."""
        return HOT_SET_AT + self.fill_bytes * self.fill_first

    @property
    def fill_at(self) -> int:
        """Where the fill begins."""
        return HOT_SET_AT + self.hot_bytes * (not self.fill_first)

    def image(self, tsc_hz: float) -> bytes:
        """The flat image; load and enter it at 0x10000."""
        image = bytearray((_GUEST / "measure.bin").read_bytes())
        fields = [1, self.hot_at, self.hot_bytes, self.stride_bytes, int(self.random)]
        fields += [round(self.write_fraction * 256), 1, 0, _SEED, self.fill_at, self.fill_bytes]
        fields += [int(_EVENT_THRESHOLD_S * tsc_hz), int(_SERIES_INTERVAL_S * tsc_hz)]
        fields += [*_EVENT_RING, *_SERIES_RING]
        fields += [0] * (31 - len(fields))
        _PARAMETERS.pack_into(image, _PARAMETERS_IN_IMAGE, b"PCYBPAR1", *fields)
        return bytes(image)

    def disk(self, tsc_hz: float) -> bytes:
        """A disk that boots the image."""
        boot = (_GUEST / "boot.bin").read_bytes()
        assert len(boot) == _SECTOR_BYTES
        return (boot + self.image(tsc_hz)).ljust(_DISK_BYTES, b"\0")


def of_size(memory_mib: int, *, random: bool, most_mib: int | None = None) -> Workload:
    """A guest of so much memory with 56 % of it data: 576 MiB of 1 GiB, 64 of them its hot set.

    :param most_mib: no more data than that, however large the guest.
    """
    data = memory_mib * 9 // 16
    if most_mib is not None:
        data = min(data, most_mib)
    hot = min(64, data // 2)
    return Workload(hot * MIB, (data - hot) * MIB, random)


@dataclass(frozen=True)
class State:
    """The guest's own counters; TSC values are the guest's."""

    magic: bytes
    phase: int
    iterations: int
    writes: int
    passes: int
    last_tsc: int
    start_tsc: int
    max_gap: int
    max_gap_tsc: int
    max_latency: int
    max_latency_tsc: int
    events: int
    series_rows: int
    sum_latency: int


class Records:
    """Reads what the guest of one machine has noted."""

    def __init__(self, memory: Memory, workload: Workload) -> None:
        self._memory = memory
        self._workload = workload

    def state(self) -> State:
        """The counters now."""
        return State(*_STATE.unpack(self._memory.read(_STATE_AT, _STATE.size)))

    def wait_running(self, timeout_s: float = 120) -> None:
        """Wait until the guest has filled its memory.

        :raises TimeoutError: it has not by then.
        """
        end = time.monotonic() + timeout_s
        while (state := self.state()).magic != b"PCYBSTA1" or state.phase != _RUNNING:
            if time.monotonic() > end:
                raise TimeoutError(f"the guest did not begin its work: {state}")
            time.sleep(0.02)

    def wait_progress(self, timeout_s: float = 60) -> None:
        """Wait until an iteration is seen to happen here.

        :raises TimeoutError: none did.
        """
        end = time.monotonic() + timeout_s
        seen = None
        while time.monotonic() < end:
            try:
                now = self._word(_STATE_AT + _ITERATIONS)
            except OSError:  # that page has not arrived
                continue
            finally:
                time.sleep(0.01)
            if seen is not None and now > seen:
                return
            seen = now
        raise TimeoutError("the guest does not run")

    def tsc_offset(self) -> int:
        """Guest TSC minus host TSC, good to a microsecond or so.

        The largest of many differences between the last TSC noted and ours just after; several
        rounds, as the vCPU may just not be on a processor.
        """
        differences = []
        for _ in range(6):
            for _ in range(200):
                noted = self._word(_STATE_AT + _LAST_TSC)
                differences.append(noted - rdtsc())
            time.sleep(0.01)
        return max(differences)

    def events(self) -> Words:
        """Slow iterations, oldest first: TSC at the end, gap, latency, address."""
        return self._ring(*_EVENT_RING, self.state().events)

    def event(self, number: int) -> Words:
        """The slow iteration of that number, counted from 0 since the guest's beginning.

        :raises OSError: its page is not there, so the guest has not been that far.
        """
        address, entries = _EVENT_RING
        return np.frombuffer(self._memory.read(address + number % entries * 32, 32), "<u8")

    def series(self) -> Words:
        """Every 10 ms: TSC, iterations so far, largest gap, largest latency of the interval."""
        return self._ring(*_SERIES_RING, self.state().series_rows)

    def _word(self, address: int) -> int:
        return int.from_bytes(self._memory.read(address, 8), "little")

    def _ring(self, address: int, entries: int, total: int) -> Words:
        kept = min(total, entries)
        raw = self._memory.read(address, kept * 32)
        rows = np.frombuffer(raw, "<u8").reshape(-1, 4)
        return np.roll(rows, -(total % entries), axis=0) if total > entries else rows.copy()

    def verify(self) -> "Verification":
        """Compare every word of hot set and fill with what it must be; the guest stands still."""
        work = self._workload
        counters, bad_words = 0, 0
        for address in _chunks(work.hot_at, work.hot_bytes):
            pages = self._chunk(address).reshape(-1, work.stride_bytes // 8)
            wanted = _pattern(address).reshape(-1, work.stride_bytes // 8)
            counters += int(pages[:, 0].sum())
            bad_words += int(np.count_nonzero(pages[:, 1:] != wanted[:, 1:]))
        for address in _chunks(work.fill_at, work.fill_bytes):
            bad_words += int(np.count_nonzero(self._chunk(address) != _pattern(address)))
        return Verification(counters, self.state().writes, bad_words)

    def _chunk(self, address: int) -> Words:
        return np.frombuffer(self._memory.read(address, MIB), "<u8")


@dataclass(frozen=True)
class Verification:
    """What the check of a guest's memory found."""

    counted_writes: int
    noted_writes: int
    bad_words: int

    @property
    def ok(self) -> bool:
        """Whether nothing is lost, stale or torn; the one write in flight may not be noted yet."""
        return self.bad_words == 0 and self.counted_writes - self.noted_writes in (0, 1)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the results."""
        return {**vars(self), "ok": self.ok}


def _chunks(address: int, n_bytes: int) -> range:
    if n_bytes % MIB:
        raise ValueError(f"{n_bytes} bytes are not whole MiB")
    return range(address, address + n_bytes, MIB)


def _pattern(address: int) -> Words:
    """The MiB from ``address`` on as the guest filled it: splitmix64 of address and seed."""
    word = np.arange(address, address + MIB, 8, dtype=np.uint64) + np.uint64(_SEED)
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word
