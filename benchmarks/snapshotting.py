"""What ``postcopy snapshot`` of a stock QEMU takes beyond the time in which the QEMU writes its file.

``python -m benchmarks.snapshotting`` (``make bench-snapshotting``): a QEMU whose guest stands still, with
random data, writes a background snapshot by itself and for ``postcopy snapshot``, in turn.  The goal: from
the order to the published image, the command takes at most 1.2 times what QEMU writes for.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Final

from benchmarks import campaign, host
from benchmarks.clock import Clock
from benchmarks.engines import Qemu, Setup
from benchmarks.qmp import QmpFailed
from benchmarks.workload import MIB, Records, Workload

GOAL: Final = 1.2
_UNLIMITED: Final = 1 << 40
_ROOM_MIB: Final = 128
_TIMEOUT_S: Final = 120.0


class _Qemu(Qemu):
    """With a second monitor, for the command."""

    @classmethod
    def command(cls, setup: Setup, qmp_path: Path, *, incoming: bool) -> list[str]:
        """See :meth:`Engine.command`."""
        line = super().command(setup, qmp_path, incoming=incoming)
        return [*line, "-qmp", f"unix:{setup.directory}/second,server=on,wait=off"]


def by_itself(qemu: Qemu, image: Path) -> float:
    """Have QEMU write a background snapshot; return what it took, in ms."""
    qemu.set_capabilities("background-snapshot")
    qemu.qmp.execute("migrate", uri=f"file:{image}")
    qemu.qmp.wait_event("MIGRATION", "completed", _TIMEOUT_S)
    _switch_off(qemu)
    took: float = qemu.info()["total-time"]
    image.unlink()
    return took


def _switch_off(qemu: Qemu) -> None:
    """Once the thread that has written it has ended."""
    states = [{"capability": "background-snapshot", "state": False}]
    while True:
        try:
            qemu.qmp.execute("migrate-set-capabilities", capabilities=states)
        except QmpFailed:
            time.sleep(0.01)
        else:
            return


def by_command(address: str, image: Path, *options: str) -> tuple[float, float]:
    """Take a snapshot; return how long QEMU wrote, and how long it took in all, in ms."""
    line = [sys.executable, "-m", "postcopy", "snapshot", "--json", "--from", address, *options]
    done = subprocess.run([*line, str(image)], check=True, stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    for each in image.parent.glob(f"{image.name}*"):
        each.unlink()
    return told["saving_ms"], told["total_ms"]


def main() -> None:
    """Measure, and print a line for each format."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.snapshotting", description=__doc__)
    parser.add_argument("--mib", type=int, default=320, help="of random data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=campaign.SHARED_MEMORY, help="of the images")
    options = parser.parse_args()
    work = Workload(MIB, (options.mib - 1) * MIB, random=True)
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-", dir=options.folder) as name:
        folder = Path(name)
        setup = Setup(folder, "kvm", options.mib + _ROOM_MIB, work, Clock.measured().anchored())
        with closing(_Qemu("source", setup)) as qemu:
            Records(qemu.memory, work).wait_running(_TIMEOUT_S)
            qemu.qmp.execute("stop")
            qemu.qmp.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED)
            for form in ("mapped-ram", "stream"):
                host.warm_memory(options.mib * 3)
                rounds = [
                    (
                        by_itself(qemu, folder / "own"),
                        *by_command(f"unix:{folder}/second", folder / "image", "--format", form),
                    )
                    for _ in range(options.rounds)
                ]
                alone, wrote, total = (
                    statistics.median(each) for each in zip(*rounds, strict=True)
                )
                print(
                    f"{form}, {options.mib} MiB: QEMU alone {alone:.0f} ms; for us it wrote {wrote:.0f} "
                    f"ms, the whole took {total:.0f} ms: {total / wrote:.2f} times, the goal is {GOAL:g}"
                )


if __name__ == "__main__":
    main()
