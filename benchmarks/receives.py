"""``python -m benchmarks.receives``: a QEMU migrates into an image, and into another QEMU, side by side."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import campaign, host
from benchmarks.clock import Clock, rdtsc
from benchmarks.engines import Engine, Postcopy, Qemu, Setup
from benchmarks.images import verify_image
from benchmarks.scenario import OURS, QEMU, Case, Contender, Figure, Target
from benchmarks.workload import MIB, Records, Workload

_CHANNELS: Final = (0, 1, 4)
_CONTENDERS: Final = (
    Contender(QEMU.name, "QEMU to QEMU", Qemu),
    Contender(OURS.name, "QEMU to `postcopy receive`", Postcopy),
)
_FIGURES: Final = (
    Figure("total_ms", "total time, as the source says it, ms"),
    Figure("mib_s", "data / total time, MiB/s"),
    Figure("finishing_ms", "of which after the last byte has come, ms", compared=False),
    Figure("source_cpu_s", "CPU time of the source, s"),
    Figure("destination_cpu_s", "CPU time of the destination, start included, s"),
    Figure("others_cpus", "CPUs busy with others", compared=False),
)
_HOT_BYTES: Final = 1 * MIB
_ROOM_MIB: Final = 128
"""What the guest has besides its data."""
_UNLIMITED: Final = 1 << 40
_IMAGE: Final = "image"


def cases(sizes_mib: Sequence[int]) -> list[Case]:
    """For each size of the data one case for each number of channels of multifd; 0: without."""
    return [
        Case(
            f"receive-{size}-{channels}",
            f"a guest that stands still sends {size} MiB of random data, "
            + (f"{channels} channels of multifd" if channels else "without multifd"),
            Workload(_HOT_BYTES, size * MIB - _HOT_BYTES, random=True),
            _FIGURES, _CONTENDERS, {"total_ms": Target(1.0)},
            memory_mib=size + _ROOM_MIB,
        )
        for size in sizes_mib
        for channels in _CHANNELS
    ]  # fmt: skip


def channels_of(case: Case) -> int:
    """How many channels of multifd a case has."""
    return int(case.name.rpartition("-")[2])


@dataclass(frozen=True)
class Receives:
    """Fills one guest, stops it, and has it sent."""

    clock: Clock
    timeout_s: float
    verify: bool

    def measure(self, case: Case, contender: Contender) -> dict[str, Any]:
        """Figures, and what both sides say."""
        with tempfile.TemporaryDirectory(
            prefix="postcopy-bench-", dir=campaign.SHARED_MEMORY
        ) as directory:
            assert case.memory_mib is not None
            folder = Path(directory)
            setup = Setup(folder, "kvm", case.memory_mib, case.workload, self.clock.anchored())
            with closing(Qemu("source", setup)) as source:
                Records(source.memory, case.workload).wait_running(self.timeout_s)
                source.qmp.execute("stop")
                source.set_capabilities("return-path")
                source.qmp.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED)
                use_channels(source, channels_of(case))
                host.warm_memory(case.memory_mib * 5 // 4)
                result = self._sent(source, case, contender, setup)
            if self.verify and contender.name == OURS.name:
                result["verified"] = verify_image(folder / _IMAGE, case.workload)
            return result

    def _sent(
        self, source: Engine, case: Case, contender: Contender, setup: Setup
    ) -> dict[str, Any]:
        waits = into_image if contender.name == OURS.name else into_qemu
        with waits(setup, channels_of(case)) as receiving:
            meter = host.CpuMeter(source=source.process.pid)
            meter.follow("destination", receiving.process.pid)
            command = rdtsc()
            source.qmp.execute("migrate", uri=receiving.uri)
            source.qmp.wait_event("MIGRATION", "completed", self.timeout_s)
            completed = source.event_tsc("MIGRATION", "completed")
            assert completed is not None
            told = receiving.told()
            figures = meter.stop()  # a process that has ended is still counted: it is reaped later
        total_ms = setup.clock.ms(completed - command)
        data_mib = (case.workload.hot_bytes + case.workload.fill_bytes) / MIB
        figures |= {"total_ms": total_ms, "mib_s": data_mib / total_ms * 1000}
        return {"figures": figures | told, "source": source.info()}


@dataclass(frozen=True)
class Receiving:
    """A destination that waits."""

    process: subprocess.Popen[Any]
    uri: str
    lines: bool = False

    def told(self) -> dict[str, Any]:
        """What it says at its end."""
        if not self.lines:
            return {}
        result = json.loads(self.process.stdout.read().splitlines()[-1])
        if result["status"] != "completed":
            raise RuntimeError(result["error"])
        return {"finishing_ms": result["finishing_ms"]}


def use_channels(engine: Engine, channels: int) -> None:
    """Switch multifd on, with so many channels; 0: leave it off."""
    if channels:
        engine.set_capabilities("multifd")
        engine.qmp.execute("migrate-set-parameters", multifd_channels=channels)


@contextmanager
def into_qemu(setup: Setup, channels: int) -> Iterator[Receiving]:
    """A QEMU that waits."""
    with closing(Qemu("destination", setup)) as engine:
        engine.qmp.execute("stop")
        use_channels(engine, channels)
        port = host.free_port()
        engine.qmp.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
        yield Receiving(engine.process, f"tcp:127.0.0.1:{port}")


@contextmanager
def into_image(setup: Setup, _channels: int) -> Iterator[Receiving]:
    """A ``postcopy receive`` that waits: it finds out by itself how many channels there are."""
    image = setup.directory / _IMAGE
    line = [sys.executable, "-m", "postcopy", "receive", "--json", "tcp:127.0.0.1:0", str(image)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Receiving(
            process, json.loads(process.stdout.readline())["text"].split()[-1], lines=True
        )
    finally:
        process.kill()
        process.communicate()


def main() -> int:
    """Run what the command line asks for; exit code as of ``python -m benchmarks``."""
    options = campaign.parser("receives", __doc__ or "", "1536").parse_args()
    if missing := campaign.missing(_CONTENDERS):
        print(missing, file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock, wanted = Clock.measured(), cases(options.sizes)
    return campaign.Campaign(
        title="a QEMU migrates into an image, and into another QEMU",
        head=campaign.head(clock, _CONTENDERS, {"repeat": options.repeat}),
        cases=wanted,
        path=options.json,
        quiet_s=options.quiet,
    ).run(
        campaign.alternating(wanted, options.repeat, wanted=options.engines),
        Receives(clock, options.timeout, options.verify).measure,
    )


if __name__ == "__main__":
    sys.exit(main())
