"""``python -m benchmarks.linux``: a Linux guest in TCG wakes, is cloned, and is stopped for a snapshot.

It is the guest of the suite (``PYTHONPATH=tests``), which writes its memory and its disk and tells of it
each 10 ms.  QEMU's own ways load the same memory before the guest runs.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Final

from benchmarks import campaign, host
from benchmarks.clock import Clock
from benchmarks.engines import Postcopy, Qemu
from benchmarks.images import run_postcopy
from benchmarks.scenario import OURS, QEMU, Case, Contender, Figure, Target
from benchmarks.waking import load_in_qemu, restore_in_qemu
from benchmarks.workload import MIB, Workload
from fakes.qemu_versions import BINARY
from fakes.real_qemu import QemuProcess
from interop.disk_guest import DISK_BYTES
from interop.linux_guest import Console, booting, pc_initrd, speaking

_MAPPED: Final = Contender("qemu-mapped", "QEMU, mapped-ram and multifd", Qemu)
_FILE: Final = Contender(QEMU.name, "QEMU, `file:`", Qemu)
_LAZY: Final = Contender(OURS.name, "`restore --lazy --qemu`", Postcopy)
_PREEMPT: Final = Contender("postcopy-preempt", "that with `--preempt`", Postcopy, ("--preempt",))
_ONE: Final = Contender("one", "one clone", Postcopy)
_EIGHT: Final = Contender("eight", "8 clones", Postcopy)
_MEMORY: Final = Contender("memory", "`snapshot`", Postcopy)
_DISKS: Final = Contender("disks", "`snapshot --disks`", Postcopy)
_CONTENDERS: Final = (_FILE, _MAPPED, _LAZY, _PREEMPT, _ONE, _EIGHT, _MEMORY, _DISKS)
_NO_WORK: Final = Workload(0, 0, random=False)
_EVERY_MS: Final = 10
_LOOK_S: Final = 0.002
_SETTLED_S: Final = 2.0
_UNLIMITED: Final = 1 << 40


def cases(size_mib: int) -> list[Case]:
    """What is done to the guest."""
    return [
        Case(
            "first-sign", f"a Linux of {size_mib} MiB, half of it data, wakes: TCG", _NO_WORK,
            (
                Figure("first_s", "command to the guest's first line, s"),
                Figure("running_s", "command to running, s"),
                Figure("complete_s", "command to all memory there, s"),
                Figure("rate_kept", "pages the guest writes a second until then / after", compared=False),
                Figure("requested", "pages that were requested"),
                Figure("rate_after", "pages that it writes a second after, thousands", compared=False),
            ),
            (_FILE, _MAPPED, _LAZY, _PREEMPT), {"first_s": Target(1.0)},
            compared=(_LAZY.name, _PREEMPT.name, _MAPPED.name),
        ),
        Case(
            "clones", "clones of that guest wake at once", _NO_WORK,
            (
                Figure("last_s", "command to the last one running, s"),
                Figure("first_s", "command to the first one running, s"),
                Figure("complete_s", "command to all memory of all there, s"),
                Figure("cached", "growth of the page cache / size of the image", compared=False),
            ),
            (_ONE, _EIGHT), {"last_s": Target(1.5)}, compared=(_EIGHT.name, _ONE.name),
        ),
        Case(
            "stop", "that guest is stopped for a snapshot", _NO_WORK,
            (
                Figure("stop_ms", "from the first STOP to the last RESUME, ms"),
                Figure("total_s", "until the image is there, s"),
            ),
            (_MEMORY, _DISKS), {"stop_ms": Target(1.2)}, compared=(_DISKS.name, _MEMORY.name),
        ),
    ]  # fmt: skip


class Linux:
    """The guest, which has been saved in both of QEMU's forms and stands still between measurements.

    :param folder: on a disk: the page cache is looked at.
    """

    def __init__(self, folder: Path, size_mib: int) -> None:
        self._folder, self.size_mib = folder, size_mib
        self._disk = folder / "disk"
        self.mapped, self.stream = folder / "mapped", folder / "stream"
        with self._disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        written_mib = size_mib // 2 - 64
        self._more = f"memory={written_mib} every={_EVERY_MS}"
        self._archive = pc_initrd(folder)
        self._qmp = f"unix:{folder / 'qmp'}"
        self._closing = ExitStack()
        console = self._closing.enter_context(closing(Console(folder / "first")))
        line = self.line(console.folder, f"file={self._disk}", ())
        options = [*line, "-qmp", f"{self._qmp},server=on,wait=off"]
        self._qemu = self._closing.enter_context(QemuProcess(console.folder, options))
        console.wait_writes(20)
        console.wait_memory(written_mib * MIB // 4096)
        self._save(self.stream)
        self._qemu("cont")
        self._save(self.mapped, "mapped-ram", "multifd")
        run_postcopy("verify", "--adopt", str(self.mapped))

    def line(self, folder: Path, disk: str, first: Sequence[str]) -> list[str]:
        """A QEMU for the guest, with the console of a folder."""
        line = [*first, "-M", "q35", "-accel", "tcg", "-m", f"{self.size_mib}M"]
        line += [*booting(self._archive, more=self._more), *speaking(folder)]
        return [
            *line,
            "-drive",
            f"{disk},format=raw,if=none,id=disk",
            "-device",
            "virtio-blk-pci,drive=disk",
        ]

    def waking(self, image: Path, folder: Path) -> list[str]:
        """A whole command line: a QEMU for the guest of an image, which finds its disk as it was."""
        first = [BINARY, "-display", "none", "-nodefaults"]
        return self.line(folder, f"snapshot=on,file={disk_of(image)}", first)

    def snapshot(self, *options: str) -> dict[str, float]:
        """Take one while it runs."""
        image = self._folder / "taken"
        self._qemu("cont")
        self._qemu.events.clear()
        began = time.monotonic()
        run_postcopy("snapshot", "--from", self._qmp, str(image), *options)
        total_s = time.monotonic() - began
        self._qemu("query-status")
        times = {name: [] for name in ("STOP", "RESUME")}
        for event in self._qemu.events:
            stamp = event["timestamp"]
            if event["event"] in times:
                times[event["event"]].append(stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3)
        self._qemu("stop")
        for path in self._folder.glob("taken*"):
            path.unlink() if path.suffix != ".qcow2" else None
        return {"stop_ms": times["RESUME"][-1] - times["STOP"][0], "total_s": total_s}

    def overlay_folder(self) -> str:
        """A folder for one snapshot's overlays."""
        return tempfile.mkdtemp(prefix="overlays-", dir=self._folder)

    def close(self) -> None:
        """End it."""
        self._closing.close()

    def _save(self, path: Path, *names: str) -> None:
        """Have it save itself while it runs; it stands still then."""
        parameters = {"max-bandwidth": _UNLIMITED, "downtime-limit": 10000, "multifd-channels": 4}
        self._qemu("migrate-set-parameters", **parameters)
        for state in (True, False):
            wanted = [{"capability": name, "state": state} for name in names]
            self._qemu("migrate-set-capabilities", capabilities=wanted)
            if state:
                self._qemu("migrate", uri=f"file:{path}")
                self._qemu.wait_migration("completed")
        shutil.copy(self._disk, disk_of(path))


def disk_of(image: Path) -> Path:
    """The disk as it was."""
    return image.with_suffix(".disk")


class Lines:
    """What a process says on standard error, and when."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with suppress(ValueError):  # it has been closed
            for line in self._process.stderr:
                self._lines.append((time.monotonic(), line))

    def times(self, text: str) -> list[float]:
        """When lines with this text came.

        :raises RuntimeError: the process has ended.
        """
        if self._process.poll() is not None:
            raise RuntimeError(f"the command has ended: {self._lines}")
        return [at for at, line in tuple(self._lines) if text in line]

    def said(self, text: str) -> str:
        """The first of them."""
        return next(line for _, line in self._lines if text in line)

    def wait(self, text: str, count: int = 1) -> list[float]:
        """Wait for so many of them."""
        while len(found := self.times(text)) < count:
            time.sleep(_LOOK_S)
        return found


def wait_first(console: Console) -> tuple[float, int]:
    """Wait until a guest has told of its memory; when that was, and how many pages it had written."""
    while (said := console.memory()) is None:
        time.sleep(_LOOK_S)
    return time.monotonic(), said.writes


def written(console: Console) -> int:
    """How many pages a guest has written."""
    said = console.memory()
    assert said is not None
    return said.writes


def first_sign(linux: Linux, contender: Contender) -> dict[str, float]:
    """Wake it once."""
    host.warm_memory(linux.size_mib * 5 // 4)
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        console = stack.enter_context(closing(Console(Path(made) / "console")))
        image = linux.stream if contender is _FILE else linux.mapped
        line, began = linux.waking(image, console.folder), time.monotonic()
        if contender is _LAZY or contender is _PREEMPT:
            options = ("--lazy", *contender.capabilities)
            process = stack.enter_context(restore_in_qemu(line, linux.mapped, *options))
            stack.callback(process.terminate)
            lines = Lines(process)
            first, before = wait_first(console)
            running = lines.wait("has the guest")[0]
            complete = lines.wait("has all memory")[0]
            now, then = time.monotonic(), written(console)
            time.sleep(_SETTLED_S)
            after = (written(console) - then) / (time.monotonic() - now)
            kept = (then - before) / (now - first) / after
            requested = float(lines.said("has all memory").split()[-2])
            more = {"rate_kept": kept, "rate_after": after / 1000, "requested": requested}
        else:
            channels = 4 if contender is _MAPPED else 0
            process, qmp = load_in_qemu(line, image, Path(made) / "qmp", channels)
            stack.callback(qmp.close)
            stack.callback(process.wait)
            stack.callback(process.kill)
            while qmp.execute("query-status")["status"] != "running":
                time.sleep(_LOOK_S)
            running = complete = time.monotonic()
            (first, _), more = wait_first(console), {}
        return more | {
            "first_s": first - began,
            "running_s": running - began,
            "complete_s": complete - began,
        }


def clones(linux: Linux, count: int) -> dict[str, float]:
    """Wake several at once; none of the image is in the page cache before."""
    host.warm_memory(count * linux.size_mib * 5 // 8)
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        for number in range(count):
            stack.enter_context(closing(Console(Path(made) / f"console{number}")))
        with linux.mapped.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, began = cached_mib(), time.monotonic()
        line = linux.waking(linux.mapped, Path(made) / "console{n}")
        process = restore_in_qemu(line, linux.mapped, "--lazy", "--count", str(count))
        stack.enter_context(process)
        stack.callback(process.terminate)
        lines = Lines(process)
        running = lines.wait("has the guest", count)
        complete = lines.wait("has all memory", count)
        image_mib = linux.mapped.stat().st_blocks * 512 / MIB
        return {
            "first_s": running[0] - began,
            "last_s": running[-1] - began,
            "complete_s": complete[-1] - began,
            "cached": (cached_mib() - before) / image_mib,
        }


def cached_mib() -> float:
    """The host's page cache."""
    text = Path("/proc/meminfo").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("Cached:"))
    return int(line.split()[1]) / 1024


def measure(linux: Linux, contender: Contender) -> dict[str, Any]:
    """One run of a case."""
    if contender is _ONE or contender is _EIGHT:
        figures = clones(linux, 8 if contender is _EIGHT else 1)
    elif contender is _MEMORY:
        figures = linux.snapshot()
    elif contender is _DISKS:
        figures = linux.snapshot("--disks", linux.overlay_folder())
    else:
        figures = first_sign(linux, contender)
    return {"figures": figures}


def main() -> int:
    """Run what the command line asks for; exit code as of ``python -m benchmarks``."""
    parser = campaign.parser("linux", __doc__ or "", "1024")
    parser.add_argument("--cases", type=lambda text: tuple(text.split(",")), default=(),
        help="first-sign, clones, stop; default: all")  # fmt: skip
    options = parser.parse_args()
    if missing := campaign.missing(_CONTENDERS, kvm=False):
        print(missing, file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (size,) = options.sizes
    wanted = [case for case in cases(size) if not options.cases or case.name in options.cases]
    with (
        tempfile.TemporaryDirectory(prefix="postcopy-bench-") as folder,
        closing(Linux(Path(folder), size)) as linux,
    ):
        return campaign.Campaign(
            title="a Linux guest in TCG",
            head=campaign.head(Clock.measured(), (_FILE, _LAZY), {"repeat": options.repeat}),
            cases=wanted,
            path=options.json,
            quiet_s=options.quiet,
        ).run(
            campaign.alternating(wanted, options.repeat, by_case=True, wanted=options.engines),
            lambda _, contender: measure(linux, contender),
        )


if __name__ == "__main__":
    sys.exit(main())
