"""A QEMU microvm whose guest writes, reads and checks its vhost-user disk; the oracle of that disk.

The guest (``disk_guest/disk.S``) polls its ring.  Write ``n`` goes to block ``37 n`` of 4 KiB, whose word
``i`` becomes ``n (FACTOR + 2 i)``; a table in its memory says which write each block has.  Behind each
write it reads another block and compares all of it, and each 16th it flushes.  A second table says what
each page shows that was read into.
"""

import struct
from pathlib import Path

import numpy as np

from fakes.real_qemu import BIOS_BYTES, QemuProcess
from fakes.waiting import wait_until
from machine.machines import MIB, need

FOLDER = Path(__file__).parent / "disk_guest"
MEMORY_BYTES = 32 * MIB
DISK_BYTES = 16 * MIB
BLOCK = 4096
FACTOR = 0x9E3779B97F4A7C15
TIMEOUT_S = 60.0

_STATE = struct.Struct("<9Q")
_STATE_AT, _TABLE_AT, _READS_AT, _READ_AT = 0x300000, 0x600000, 0x680000, 0xC00000
_PAGES = 1024
_MACHINE = "microvm,pit=off,pic=off,rtc=off,isa-serial=off,acpi=off,auto-kernel-cmdline=off"
_FAULT = "vhost_user_postcopy_fault_handler_found"


class DiskGuest(QemuProcess):
    """One QEMU with the guest, or one that waits for it.

    :param back_end: the path of the socket of its disk.
    :param more: options of that socket.
    """

    def __init__(
        self, folder: Path, back_end: Path, accelerator: str = "tcg", *, incoming=False, more=""
    ):
        if accelerator == "kvm":
            need("kvm")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        firmware = folder / "firmware"
        firmware.write_bytes(_firmware())
        memory = f"memory-backend-memfd,id=microvm.ram,size={MEMORY_BYTES >> 20}M,share=on"
        command = ["-M", f"{_MACHINE},memory-backend=microvm.ram", "-object", memory]
        command += ["-m", f"{MEMORY_BYTES >> 20}M", "-accel", accelerator, "-bios", str(firmware)]
        command += ["-global", "virtio-mmio.force-legacy=off", "-trace", f"{_FAULT}*"]
        command += ["-chardev", f"socket,id=disk,path={back_end}{more}"]
        command += ["-device", "vhost-user-blk,id=disk0,chardev=disk"]
        super().__init__(folder, [*command, *(["-incoming", "defer"] if incoming else [])])

    def memory(self, address: int, length: int) -> bytes:
        """A copy of guest memory."""
        path = self._folder / "memory"
        self("pmemsave", val=address, size=length, filename=str(path))
        return path.read_bytes()

    def writes(self) -> int:
        """How many writes have been done, all right so far."""
        phase, done, bad, *_, where = _STATE.unpack(self.memory(_STATE_AT, _STATE.size))
        assert phase in {0, 1, 2}, f"the guest has given up: {phase}"
        assert not bad, f"{bad} words or statuses were wrong, the first in block {where}"
        return done

    def wait_writes(self, count: int) -> int:
        """Let it do so many more."""
        before = self.writes()
        wait_until(
            lambda: self.writes() >= before + count, TIMEOUT_S, f"{count} writes of the guest"
        )
        return self.writes()

    def back_end_faults(self) -> int:
        """Pages that a back end asked for in a postcopy."""
        return self.log.count(_FAULT)

    def check(self, path: Path) -> int:
        """Stop the guest and compare every byte of its disk, and of what it has read from it.

        :return: how many blocks it has written.
        """
        self("stop")
        self.writes()
        self._check_pages()
        _, done, _, begun, block, blocks, *_ = _STATE.unpack(self.memory(_STATE_AT, _STATE.size))
        table = np.frombuffer(self.memory(_TABLE_AT, 8 * blocks), np.uint64).copy()
        found = np.frombuffer(path.read_bytes(), np.uint64).reshape(blocks, BLOCK // 8)
        expected = _contents(table)
        if begun != done or table[block] != begun:  # it may have reached the disk or not
            table[block] = begun
            expected[block] = np.where(
                (found[block] == expected[block]).all(), expected[block], _contents(table)[block]
            )
        wrong = np.flatnonzero((found != expected).any(axis=1))
        assert not len(wrong), f"blocks {wrong[:10].tolist()} of the disk are not what was written"
        return int(np.count_nonzero(table))

    def _check_pages(self) -> None:
        """Pages that only the device has written must have moved with the guest."""
        shown = np.frombuffer(self.memory(_READS_AT, 8 * _PAGES), np.uint64)
        found = np.frombuffer(self.memory(_READ_AT, BLOCK * _PAGES), np.uint64)
        read = np.flatnonzero(shown)
        pages = found.reshape(_PAGES, BLOCK // 8)[read]
        wrong = read[(pages != _contents(shown[read] - np.uint64(1))).any(axis=1)]
        assert len(read)
        assert not len(wrong), f"pages {wrong[:10].tolist()} are not what was read into them"


def _contents(table: np.ndarray) -> np.ndarray:
    words = np.uint64(FACTOR) + 2 * np.arange(BLOCK // 8, dtype=np.uint64)
    return table[:, None] * words[None, :]


def _firmware() -> bytes:
    """The image, and the reset vector 16 bytes before the end: a jump over the whole segment."""
    image = (FOLDER / "disk.bin").read_bytes()
    vector = b"\xe9" + struct.pack("<H", 0x10000 - 0xFFF3)
    return image.ljust(BIOS_BYTES - 16, b"\0") + vector.ljust(16, b"\0")
