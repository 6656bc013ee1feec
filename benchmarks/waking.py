"""``python -m benchmarks.waking``: a saved guest wakes in a stock QEMU, and its memory comes later.

The guests are microvms with the workload ``hammer``, and half of their memory is data.  QEMU's own way
is its quickest, ``mapped-ram`` with ``multifd``.  The code of the suite starts them: ``PYTHONPATH=tests``.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import campaign, host
from benchmarks.clock import Clock
from benchmarks.engines import Postcopy, Qemu
from benchmarks.images import run_postcopy
from benchmarks.qmp import Qmp
from benchmarks.report import Finding, Results, median, number
from benchmarks.scenario import OURS, QEMU, Case, Contender, Figure, Target
from benchmarks.workload import MIB, Workload
from fakes.qemu_versions import BINARY, folder_of
from fakes.real_qemu import MICROVM, bios
from interop.arrival import send_to_qemu
from interop.qemu_guest import QemuGuest
from postcopy.machine.workload import load

_CONTENDERS: Final = (
    Contender(QEMU.name, "QEMU, mapped-ram and multifd", Qemu),
    Contender(OURS.name, "`postcopy restore --lazy --qemu`", Postcopy),
)
_FIGURES: Final = (
    Figure("running_s", "command to running, s"),
    Figure("complete_s", "command to all memory there, s"),
)
_CHANNELS: Final = 4
_FLAT: Final = 1.2
_HOT_BYTES: Final = 8 * MIB
_NO_WORK: Final = Workload(0, 0, random=False)
_POLL_S: Final = 0.002
_UNLIMITED: Final = 1 << 40
_SOONER: Final = (4096, 0.2)
_WHOLE: Final = 2.0


def cases(versions: Sequence[str], sizes_mib: Sequence[int]) -> list[Case]:
    """Each version of QEMU, each size, with the image in the page cache and without."""
    return [
        Case(
            f"{version}-{size}-{cache}",
            f"QEMU {version}: a guest of {size} MiB wakes from {size // 2} MiB of data, {cache} cache",
            _NO_WORK, _FIGURES, _CONTENDERS,
            {"complete_s": Target(_WHOLE)}
            | ({"running_s": Target(_SOONER[1])} if size == _SOONER[0] else {}),
            memory_mib=size,
        )
        for version in versions
        for size in sizes_mib
        for cache in ("warm", "cold")
    ]  # fmt: skip


def load_in_qemu(line: Sequence[str], image: Path, monitor: Path, channels: int) -> tuple[Any, Qmp]:
    """Start a QEMU that loads an image: ``mapped-ram`` with so many channels, or a plain stream with 0."""
    command = [*line, "-incoming", "defer", "-qmp", f"unix:{monitor},server=on,wait=off"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    qmp = Qmp(monitor, lambda: process.poll() is None)
    if channels:
        wanted = [{"capability": name, "state": True} for name in ("mapped-ram", "multifd")]
        qmp.execute("migrate-set-capabilities", capabilities=wanted)
        qmp.execute("migrate-set-parameters", multifd_channels=channels)
    qmp.execute("migrate-incoming", uri=f"file:{image}")
    return process, qmp


def restore_in_qemu(line: Sequence[str], image: Path, *options: str) -> "subprocess.Popen[str]":
    """Start ``postcopy restore --qemu``; its lines are to be read."""
    command = [sys.executable, "-m", "postcopy", "restore", str(image), "--qemu", shlex.join(line)]
    return subprocess.Popen(
        [*command, *options], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_line(process: "subprocess.Popen[str]", text: str) -> float:
    """Wait until the command says that; return when.

    :raises RuntimeError: it does not.
    """
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        if text in line:
            return time.monotonic()
        lines.append(line)
    raise RuntimeError(f"the command has ended: {lines}")


@dataclass
class Wakes:
    """The images of the present case, and how each contender wakes the guest of one."""

    folder: Path
    _made: ExitStack = field(default_factory=ExitStack)
    _present: tuple[str, str] = ("", "")
    _images: Path = Path()

    def measure(self, case: Case, contender: Contender) -> dict[str, Any]:
        """Wake one guest, and end it."""
        version, size, cache = case.name.split("-")
        image = self._image(version, int(size))
        host.warm_memory(int(size) // 2 * 5 // 4)
        look_at(image, cached=cache == "warm")
        ours = contender.name == OURS.name
        figures = (self._ours if ours else self._theirs)(version, int(size), image)
        return {"figures": figures}

    def close(self) -> None:
        """Remove the image."""
        self._made.close()

    def _line(self, version: str, size: int) -> list[str]:
        binary = str(folder_of(version) / BINARY)
        line = [binary, "-M", MICROVM, "-accel", "kvm", "-m", f"{size}M", "-display", "none"]
        return [*line, "-nodefaults", *bios(self._images)]

    def _ours(self, version: str, size: int, image: Path) -> dict[str, float]:
        began = time.monotonic()
        with restore_in_qemu(self._line(version, size), image, "--lazy") as process:
            try:
                running = wait_line(process, "has the guest") - began
                return {
                    "running_s": running,
                    "complete_s": wait_line(process, "has all memory") - began,
                }
            finally:
                process.terminate()

    def _theirs(self, version: str, size: int, image: Path) -> dict[str, float]:
        began, monitor = time.monotonic(), self._images / "qmp"
        process, qmp = load_in_qemu(self._line(version, size), image, monitor, _CHANNELS)
        try:
            while qmp.execute("query-status")["status"] != "running":
                time.sleep(_POLL_S)
            running = time.monotonic() - began
            return {"running_s": running, "complete_s": running}
        finally:
            process.kill()
            process.wait()
            qmp.close()
            monitor.unlink()

    def _image(self, version: str, size: int) -> Path:
        if self._present != (version, str(size)):
            self._made.close()
            made = tempfile.TemporaryDirectory(prefix="postcopy-bench-", dir=self.folder)
            self._images = Path(self._made.enter_context(made))
            print(f"QEMU {version} writes an image of {size} MiB", file=sys.stderr)
            self._save(version, size)
            self._present = version, str(size)
        return self._images / "image"

    def _save(self, version: str, size: int) -> None:
        path, fill = self._images / "image", size // 2 * MIB - _HOT_BYTES
        work = load("hammer", size * MIB, 1, fill_bytes=fill, hot_bytes=_HOT_BYTES)
        os.environ["PATH"] = f"{folder_of(version)}{os.pathsep}{os.environ['PATH']}"
        with QemuGuest(self._images / "saving", "microvm", "kvm", size * MIB, 1) as qemu:
            send_to_qemu(work, qemu)
            qemu.capabilities("mapped-ram", "multifd")
            qemu.parameters(
                max_bandwidth=_UNLIMITED, multifd_channels=_CHANNELS, downtime_limit=10000
            )
            qemu("migrate", uri=f"file:{path}")
            qemu.wait_migration("completed")
        run_postcopy("verify", "--adopt", str(path))


def look_at(image: Path, *, cached: bool) -> None:
    """Have all of a file in the page cache, or nothing of it."""
    with image.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        if not cached:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return
        while file.read(8 * MIB):
            pass


def flatness(cases: Sequence[Case], results: Results) -> list[Finding]:
    """How much the time to running varies with the guest's size, for each version and cache."""
    found = []
    kinds = sorted({(case.name.split("-")[0], case.name.split("-")[2]) for case in cases})
    for version, cache in kinds:
        of_kind = [each for each in cases if each.name.startswith(version) and cache in each.name]
        medians = [median(case, OURS.name, "running_s", results) for case in of_kind]
        known = [value for value in medians if value is not None]
        if len(known) < max(2, len(of_kind)):
            continue
        ratio = max(known) / min(known)
        title = f"QEMU {version}, {cache}: longest time to running by shortest, of all sizes"
        found.append(Finding(title, number(ratio), f"≤ {_FLAT:g}", ratio <= _FLAT))
    return found


def main() -> int:
    """Run what the command line asks for; exit code as of ``python -m benchmarks``."""
    parser = campaign.parser("waking", __doc__ or "", "1024,2048,4096,8192")
    parser.add_argument("--versions", type=lambda text: tuple(text.split(",")),
        default=("10.0", "11.1"), help="of QEMU; default: 10.0,11.1")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()),
        help="for images: on a disk, or there is no cold cache; default: %(default)s")  # fmt: skip
    options = parser.parse_args()
    if missing := campaign.missing(_CONTENDERS):
        print(missing, file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted, wakes = cases(options.versions, options.sizes), Wakes(options.folder)
    try:
        return campaign.Campaign(
            title="a saved guest wakes in a stock QEMU",
            head=campaign.head(Clock.measured(), _CONTENDERS, {"repeat": options.repeat}),
            cases=wanted,
            path=options.json,
            across=lambda results: flatness(wanted, results),
            quiet_s=options.quiet,
        ).run(
            campaign.alternating(wanted, options.repeat, by_case=True, wanted=options.engines),
            wakes.measure,
        )
    finally:
        wakes.close()


if __name__ == "__main__":
    sys.exit(main())
