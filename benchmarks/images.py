"""Images of the measuring guest that several runs wake from, and what is measured of each waking."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import campaign, host
from benchmarks.clock import Clock, rdtsc
from benchmarks.engines import Awakening, Engine, Postcopy, Setup
from benchmarks.scenario import Case, Contender
from benchmarks.timings import Figures
from benchmarks.workload import MIB, Records, Workload
from postcopy.image.formats import open_image

_UNLIMITED: Final = 1 << 40
_ANY_DOWNTIME_MS: Final = 2_000_000
_SETTLE_S: Final = 0.5
_ENDED: Final = ("completed", "failed", "postcopy-paused")


@dataclass(frozen=True)
class Image:
    """A guest in a file.

    :ivar events: how many slow iterations its guest had noted; what it notes next is of a new life.
    """

    path: Path
    events: int


class Images:
    """One image for each engine and case, made when it is first wanted; those of one case at a time.

    All lie in memory: no disk is measured.
    """

    def __init__(self, clock: Clock, timeout_s: float) -> None:
        self._clock, self._timeout_s = clock, timeout_s
        self._case = ""
        self._images: dict[type[Engine], Image] = {}
        self._closing = ExitStack()
        self._folder = Path()

    def __enter__(self) -> "Images":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def image(self, case: Case, engine: type[Engine]) -> Image:
        """The image that this engine has written of a guest of this case."""
        if case.name != self._case:
            self._closing.close()
            self._images.clear()
            self._case = case.name
            self._folder = Path(self._closing.enter_context(_folder()))
        if engine not in self._images:
            print(f"{engine.title} writes the image of {case.name}", file=sys.stderr)
            self._images[engine] = self._made(engine, self.setup(case, self._folder))
        return self._images[engine]

    def setup(self, case: Case, folder: Path) -> Setup:
        """What a process of this case gets."""
        assert case.memory_mib is not None
        return Setup(folder, "kvm", case.memory_mib, case.workload, self._clock.anchored())

    def _made(self, kind: type[Engine], setup: Setup) -> Image:
        path = setup.directory / f"{kind.title}.image"
        with closing(kind("source", setup)) as engine:
            records = Records(engine.memory, setup.workload)
            records.wait_running(self._timeout_s)
            time.sleep(_SETTLE_S)
            engine.set_capabilities("mapped-ram")
            engine.qmp.execute(
                "migrate-set-parameters", max_bandwidth=_UNLIMITED, downtime_limit=_ANY_DOWNTIME_MS
            )
            engine.qmp.execute("migrate", uri=f"file:{path}")
            engine.qmp.wait_event("MIGRATION", "completed", self._timeout_s)
            image = Image(path, records.state().events)  # the guest stands still
        if kind is Postcopy:
            run_postcopy("verify", "--adopt", str(path))
        return image


def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="postcopy-bench-", dir=campaign.SHARED_MEMORY)


def run_postcopy(*arguments: str) -> None:
    """Run one of our commands to its end.

    :raises RuntimeError: it failed; what it said.
    """
    command = [sys.executable, "-m", "postcopy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"postcopy {arguments[0]} failed: {done.stdout}{done.stderr}")


@dataclass(frozen=True)
class Woken:
    """A guest that has woken and is whole.

    :ivar first: host TSC when it had done its first access.
    :ivar offset: of its TSC to the host's.
    """

    engine: Engine
    records: Records
    setup: Setup
    first: int
    offset: int
    info: Mapping[str, Any]
    load: Figures

    def ms(self, tsc: int) -> float:
        """Milliseconds from the start of the process to a host TSC."""
        return self.setup.clock.ms(tsc - self.engine.began)


def wake(
    images: Images,
    case: Case,
    contender: Contender,
    timeout_s: float,
    look: Callable[[Woken], dict[str, Any]],
    *,
    verify: bool,
) -> dict[str, Any]:
    """Wake a guest of this case, wait until it is whole, and have it looked at; then end it.

    :param verify: when all has been measured, stop the guest and check all of its memory.
    """
    image = images.image(case, contender.engine)
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as folder:
        setup = images.setup(case, Path(folder))
        host.warm_memory(data_mib(case.workload) * 5 // 4)
        time.sleep(0.1)
        awakening = Awakening(image.path, contender.options)
        meter = host.CpuMeter()
        with closing(contender.engine("restored", setup, awakening)) as engine:
            meter.follow("engine", engine.process.pid)
            records = Records(engine.memory, case.workload)
            # Not a look at the memory before: who reads a page that nobody watches yet makes it one of
            # zeros, and then it is not missing.
            info = _whole(engine, timeout_s)
            load: Figures = {**meter.stop()}
            records.wait_progress(timeout_s)
            seen = rdtsc()
            offset = records.tsc_offset()
            first = first_access(records, image, offset)
            if not engine.began < first <= seen:
                raise RuntimeError(
                    f"the guest's clock is not understood: {engine.began} < {first} <= {seen}?"
                )
            result = look(Woken(engine, records, setup, first, offset, info, load))
            if verify:
                engine.qmp.execute("stop")
                result["verified"] = records.verify().to_json()
            return result


class ImageMemory:
    """The memory below 3 GiB of a guest in an image, whoever has written it.

    :raises PostcopyError: it is no image.
    """

    def __init__(self, path: Path) -> None:
        self._image = open_image(path)
        self._ram = max(self._image.blocks, key=lambda block: block.size_bytes).name

    def read(self, address: int, n_bytes: int) -> bytes:
        """See :class:`benchmarks.workload.Memory`."""
        first, end = address // 4096, -(-(address + n_bytes) // 4096)
        start = address - first * 4096
        return self._image.read(self._ram, first, end - first).tobytes()[start : start + n_bytes]

    def close(self) -> None:
        """Let go of the file."""
        self._image.close()


def verify_image(path: Path, work: Workload) -> dict[str, Any]:
    """Check all of the memory in an image: its guest was at one point of its life."""
    with closing(ImageMemory(path)) as memory:
        return Records(memory, work).verify().to_json()


def data_mib(work: Workload) -> int:
    """How much of the guest's memory is data, in MiB."""
    return (work.hot_bytes + work.fill_bytes) // MIB


def first_access(records: Records, image: Image, offset: int) -> int:
    """Host TSC when the guest had done its first access after it has woken.

    Its first iteration spans the time for which it slept, by its own clock, or at least the faults for
    its code and its records: it is always one of those that the guest notes.
    """
    if records.state().events <= image.events:
        raise RuntimeError("the guest has noted nothing since it has woken")
    return int(records.event(image.events)[0]) - offset


def _whole(engine: Engine, timeout_s: float) -> dict[str, Any]:
    """Wait until all of the memory is there; the last ``query-migrate``."""
    end = time.monotonic() + timeout_s
    while (info := engine.info()).get("status") not in _ENDED:
        if time.monotonic() > end:
            raise RuntimeError(f"not whole in time: {info}")
        time.sleep(0.02)
    if info["status"] != "completed":
        raise RuntimeError(
            f"{info.get('status')} {info.get('error-desc', '')}: {engine.log_tail()}"
        )
    return info


def times(info: Mapping[str, Any]) -> Figures:
    """What our ``query-migrate`` says of a restore, under our names; a real QEMU says nothing."""
    measured = info.get("x-postcopy", {})

    def ms(key: str) -> float | None:
        value = measured.get(key)
        return None if value is None else value / 1000

    return {
        "running_ms": ms("restore-running-us"),
        "ready_ms": ms("restore-ready-us"),
        "complete_ms": ms("restore-complete-us"),
        "demand_faults": measured.get("demand-faults"),
        "working_set_pages": measured.get("working-set-pages"),
        "reported_fault_p50_us": measured.get("fault-latency-p50-us"),
        "reported_fault_p99_us": measured.get("fault-latency-p99-us"),
        "reported_fault_max_us": measured.get("fault-latency-max-us"),
    }
