"""Linux guests that write their disk, read it back and compare, by QEMU and by user-mode Linux.

``linux_guest/init.c`` is all that runs in them; it tells on the console how many writes each of its
workers has done.  The disk must be empty at the start.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fakes.real_qemu import QemuProcess
from fakes.unpacked import peer
from fakes.waiting import wait_until
from interop.disk_guest import BLOCK, DISK_BYTES, FACTOR

TIMEOUT_S = 90.0
"""Linux boots within 4 s where the host is idle."""

OUTPUT, SOCKET = "console", "console.socket"

WORDS = BLOCK // 8
WORKERS, MOST = 4, 8

_SOURCE = Path(__file__).parent / "linux_guest" / "init.c"
_SAID = re.compile(rb"^(writes|stopped) (\d+) (\d+) (\d+) (\d+) wrong (\d+)\r*$", re.MULTILINE)
_MEMORY_SAID = re.compile(
    rb"^memory (\d+) wrong (\d+) clocks (\d+) (\d+) (\d+)\r*\n(?:writes|stopped) .*$", re.MULTILINE
)
_PC_DRIVERS = ("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev",
               "virtio_pci", "virtio_blk")  # fmt: skip
_FAULT = "vhost_user_postcopy_fault_handler_found"
_MEMORY = "128M"


class Said(NamedTuple):
    """What the guest says of its memory and its clocks.

    :ivar writes: how many pages of its memory it has written, all right before.
    :ivar monotonic_ms: ``CLOCK_MONOTONIC``, and so on.
    :ivar pc_ms: the PC's own clock, in whole seconds; 0: the guest sees none.
    """

    writes: int
    monotonic_ms: int
    realtime_ms: int
    pc_ms: int


class Console:
    """What a guest says, and the way by which it is told to stop: QEMU's socket, or a pipe."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.output = folder / OUTPUT
        self.output.touch()
        self.socket = folder / SOCKET
        self.input = folder / "console.in"
        os.mkfifo(self.input)
        self._input = os.open(self.input, os.O_RDWR)

    def writes(self) -> tuple[int, ...]:
        """How many writes each worker has said to have done; all were right so far."""
        said = _SAID.findall(self.output.read_bytes())
        return self._checked(said[-1]) if said else (0,) * WORKERS

    def wait_writes(self, count: int, since: tuple[int, ...] = (0,) * WORKERS) -> None:
        """Wait until each worker has done so many more."""

        def done() -> bool:
            return all(now >= then + count for now, then in zip(self.writes(), since, strict=True))

        wait_until(done, TIMEOUT_S, lambda: f"{count} writes of each worker; {self.tail()}")

    def memory(self) -> Said | None:
        """What it has said last of its memory, if it writes any; all was right so far."""
        said = _MEMORY_SAID.findall(self.output.read_bytes())
        if not said:
            return None
        writes, wrong, *clocks = map(int, said[-1])
        assert wrong == 0, f"{wrong} words of the memory were wrong; {self.tail()}"
        return Said(writes, *clocks)

    def wait_memory(self, beyond: int = 0) -> Said:
        """Wait until it has written more than so many pages."""

        def further() -> bool:
            said = self.memory()
            return said is not None and said.writes > beyond

        wait_until(further, TIMEOUT_S, lambda: f"{beyond} pages written; {self.tail()}")
        found = self.memory()
        assert found is not None
        return found

    def stop(self) -> tuple[int, ...]:
        """Have the guest stop, read all of its disk and of its memory, and end.

        :return: how many writes each worker has done.
        """
        if self.socket.exists():
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.socket))
                connection.sendall(b"stop\n")
        else:
            os.write(self._input, b"stop\n")

        def last() -> list[tuple[bytes, ...]]:
            return [
                said for said in _SAID.findall(self.output.read_bytes()) if said[0] == b"stopped"
            ]

        wait_until(last, TIMEOUT_S, lambda: f"the guest's last word; {self.tail()}")
        self.memory()
        return self._checked(last()[0])

    def tail(self) -> str:
        """The end of what it has said."""
        return f"the console: {self.output.read_bytes()[-500:].decode(errors='replace')}"

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._input)

    def _checked(self, said: tuple[bytes, ...]) -> tuple[int, ...]:
        _, *counts, wrong = said
        assert int(wrong) == 0, f"{int(wrong)} words were wrong; {self.tail()}"
        return tuple(int(count) for count in counts)


class LinuxGuest(QemuProcess):
    """One QEMU with the guest, or one that waits for it; in TCG.

    :param back_end: the path of the socket of its disk.
    :param machine: ``pc`` or ``q35``.
    :param more: options of that socket.
    """

    def __init__(
        self, folder: Path, back_end: Path, machine: str, *, incoming: bool = False, more: str = ""
    ) -> None:
        self.console = Console(folder)
        memory = f"memory-backend-memfd,id=memory,size={_MEMORY},share=on"
        command = ["-M", f"{machine},memory-backend=memory", "-m", _MEMORY, "-object", memory]
        command += ["-accel", "tcg", "-trace", f"{_FAULT}*"]
        command += [*booting(pc_initrd(folder)), *speaking(folder)]
        command += ["-chardev", f"socket,id=disk,path={back_end}{more}"]
        command += ["-device", "vhost-user-blk-pci,id=disk0,chardev=disk"]
        super().__init__(folder, [*command, *(["-incoming", "defer"] if incoming else [])])

    def back_end_faults(self) -> int:
        """Pages that a back end asked for in a postcopy."""
        return self.log.count(_FAULT)

    def stop(self) -> tuple[int, ...]:
        """Have the guest stop, and wait until it has switched the machine off."""
        counts = self.console.stop()
        self.wait_end()
        return counts

    def close(self) -> None:
        super().close()
        self.console.close()


class UserModeLinux:
    """One user-mode Linux with the guest.

    :param back_end: the path of the socket of its disk.
    """

    def __init__(self, folder: Path, back_end: Path) -> None:
        self.console = Console(folder)
        command = [peer("usr/bin/linux.uml"), "mem=64M", "quiet", "con0=fd:0,fd:1", "con=null"]
        command += [f"initrd={initrd(folder, [peer('drivers/uml/virtio_blk.ko')])}"]
        command += [f"uml_dir={folder}", f"virtio_uml.device={back_end}:2"]
        with self.console.input.open("r+b", 0) as told, self.console.output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=told,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TMPDIR": str(folder)},  # its memory is mapped executable
                start_new_session=True,
            )

    def __enter__(self) -> "UserModeLinux":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.console.close()

    def stop(self) -> tuple[int, ...]:
        """Have the guest stop, and wait until it has halted."""
        counts = self.console.stop()
        assert self._process.wait(TIMEOUT_S) == 0, self.console.tail()
        return counts


def booting(archive: Path, *, more: str = "") -> list[str]:
    """The arguments of a QEMU that boots the guest; its disk and console are for the caller to add.

    :param archive: from :func:`pc_initrd`.
    :param more: what the kernel's command line has besides, such as ``memory=32``.
    """
    line = ["-no-reboot", "-kernel", str(peer("boot/vmlinuz")), "-initrd", str(archive)]
    return [*line, "-append", f"console=ttyS0 quiet panic=-1 {more}".rstrip()]


def speaking(folder: Path) -> list[str]:
    """The arguments of a QEMU whose serial line is the console of a folder."""
    way = f"path={folder}/{SOCKET},server=on,wait=off,logfile={folder}/{OUTPUT}"
    return ["-serial", "chardev:console", "-chardev", f"socket,id=console,{way}"]


def pc_initrd(folder: Path) -> Path:
    """The archive of a guest of QEMU's ``pc`` or ``q35``."""
    return initrd(folder, [peer(f"drivers/pc/{name}.ko") for name in _PC_DRIVERS])


def initrd(folder: Path, drivers: list[Path]) -> Path:
    """The archive (cpio, format newc) with the guest's only program and the drivers that it loads."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler: apt-get install gcc libc6-dev")
    init, path = folder / "init", folder / "initrd"
    command = ["cc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", init, _SOURCE]
    subprocess.run(command, check=True, timeout=60)
    entries = [("dev", 0o040755, b""), ("init", 0o100755, init.read_bytes())]
    entries += [(f"{n}.ko", 0o100644, driver.read_bytes()) for n, driver in enumerate(drivers)]
    entries += [("TRAILER!!!", 0, b"")]
    path.write_bytes(b"".join(_entry(n, *entry) for n, entry in enumerate(entries, 1)))
    return path


def check_disk(path: Path, counts: tuple[int, ...]) -> None:
    """Compare every byte of the disk with what so many writes of each worker have made of it."""
    table = np.zeros(DISK_BYTES // BLOCK, np.uint64)
    part = len(table) // WORKERS
    for worker, count in enumerate(counts):
        for n in range(1, count + 1):
            at = worker * part + 37 * n % (part - MOST)
            table[at : at + 1 + n % MOST] = n
    words = np.uint64(FACTOR) + 2 * np.arange(table.size * WORDS, dtype=np.uint64)
    expected = table[:, None] * words.reshape(table.size, WORDS)
    found = np.frombuffer(path.read_bytes(), np.uint64).reshape(expected.shape)
    wrong = np.flatnonzero((found != expected).any(axis=1))
    assert not len(wrong), f"blocks {wrong[:10].tolist()} of the disk are not what was written"


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    counted = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(counted), 0)
    head = _padded(b"070701" + b"".join(b"%08X" % field for field in fields) + counted)
    return head + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
