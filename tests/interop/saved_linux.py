"""A Linux guest that was saved in a real QEMU, with its disk, in two ways; QEMUs that it wakes in."""

import json
import shutil
import time
from pathlib import Path

from fakes.commands import postcopy
from fakes.real_qemu import FILE_URIS, QemuProcess
from fakes.receiving import Receiving
from fakes.waiting import wait_until
from interop.disk_guest import DISK_BYTES
from interop.linux_guest import TIMEOUT_S, Console, booting, check_disk, pc_initrd, speaking
from interop.test_restore_in_qemu import Restoring
from machine.machines import MIB

MEMORY_BYTES = 128 * MIB
WRITTEN_MIB = 24
"""Of the guest's memory, all the time."""


class SavedLinux:
    """Two images of one guest; it went on behind both, and was right to its end.

    :ivar image: by ``postcopy snapshot --disks``.
    :ivar received: by ``postcopy receive``, of QEMUs after 8.2; ``received_disk`` is its disk, a qcow2.
    :ivar memory: what ``pmemsave`` wrote of the guest that had sent itself.
    :ivar left: what the guest had said last before ``image``; ``left_at_s``: when, or before.
    :ivar saved_at_s: when ``image`` was complete.  Both are of the host's ``CLOCK_MONOTONIC``.
    """

    def __init__(self, folder: Path, machine: str) -> None:
        self.disk = folder / "disk"
        self.image, self.received = folder / "image", folder / "received"
        self.received_disk, self.memory = folder / "received.qcow2", folder / "memory"
        with self.disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        console = Console(folder / "first")
        self._line = ["-M", machine, "-accel", "tcg", "-m", f"{MEMORY_BYTES // MIB}M"]
        self._line += booting(pc_initrd(folder), more=f"memory={WRITTEN_MIB}")
        qmp = f"unix:{folder / 'qmp'}"
        monitor = ["-qmp", f"{qmp},server=on,wait=off"]
        line = [*self.line(console.folder, self.disk, "raw"), *monitor]
        with QemuProcess(console.folder, line) as qemu:
            console.wait_writes(50)
            console.wait_memory(WRITTEN_MIB * MIB // 4096)
            self._save(console, qmp)
            console.wait_writes(20, since=console.writes())
            if qemu.version >= FILE_URIS:  # 7.2 does not see all that a guest in TCG writes
                self._receive(qemu, folder)
                qemu("cont")
            console.wait_writes(20, since=console.writes())
            console.stop()
            qemu.wait_end()
        console.close()

    def line(self, folder: Path, disk: Path, form: str) -> list[str]:
        """A QEMU for the guest, with the console of a folder."""
        drive = f"file={disk},format={form},if=none,id=disk"
        return [
            *self._line,
            *speaking(folder),
            "-drive",
            drive,
            "-device",
            "virtio-blk-pci,drive=disk",
        ]

    def _save(self, console: Console, qmp: str) -> None:
        self.left_at_s = time.monotonic()
        self.left = console.wait_memory(console.wait_memory().writes)
        (console.folder / "overlays").mkdir()
        order = [
            "snapshot",
            "--from",
            qmp,
            str(self.image),
            "--disks",
            str(console.folder / "overlays"),
        ]
        outcome = postcopy(*order, "--json")
        assert outcome.returncode == 0, outcome.stderr
        self.saved_at_s = time.monotonic()
        (self._overlay,) = json.loads(outcome.stdout.splitlines()[-1])["overlays"].values()

    def _receive(self, qemu: QemuProcess, folder: Path) -> None:
        with Receiving(f"unix:{folder / 'way'}", self.received) as receiving:
            qemu("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": 2000})
            qemu("migrate", uri=receiving.uri)
            qemu.wait_migration("completed")
            receiving.result()
        qemu("pmemsave", val=0, size=MEMORY_BYTES, filename=str(self.memory))
        shutil.copy(self._overlay, self.received_disk)


class Clones:
    """The command ``restore --qemu`` for a number of clones, and their consoles.

    :param disk: what its command line names; with ``--overlay-dir`` the command replaces it.
    """

    def __init__(
        self,
        saved: SavedLinux,
        folder: Path,
        image: Path,
        disk: tuple[Path, str],
        *options: str,
        count: int = 1,
    ) -> None:
        self.consoles = [Console(folder / f"console{number}") for number in range(count)]
        self.began_at_s = time.monotonic()
        line = saved.line(folder / "console{n}", *disk)
        options = (*options, "--count", str(count))
        self.command = Restoring(folder, image, *options, qmp="clone{n}.qmp", line=line)

    def __enter__(self) -> "Clones":
        return self

    def __exit__(self, *_: object) -> None:
        self.command.__exit__()
        for console in self.consoles:
            console.close()

    def stop(self) -> list[tuple[int, ...]]:
        """Have each work on, stop and check all of its memory and disk; how much each has written."""
        for _ in self.consoles:
            self.command.wait_line("has all memory")
        for console in self.consoles:
            console.wait_writes(1)
            console.wait_writes(20, since=console.writes())
        counts = [console.stop() for console in self.consoles]
        assert self.command.process.wait(30) == 0, self.command.lines
        return counts


def check_overlay(path: Path, counts: tuple[int, ...], folder: Path) -> None:
    """Compare every byte of a qcow2, with all that is below it; a QEMU without a guest reads it."""
    copy = folder / f"{path.name}.raw"
    line = ["-M", "none", "-S", "-drive", f"file={path},if=none,id=disk"]
    with QemuProcess(folder, line) as qemu:
        qemu("drive-backup", **{"job-id": "copy", "device": "disk", "sync": "full",
                                "format": "raw", "target": str(copy)})  # fmt: skip
        wait_until(lambda: not qemu("query-block-jobs"), TIMEOUT_S, "the copy")
    check_disk(copy, counts)
