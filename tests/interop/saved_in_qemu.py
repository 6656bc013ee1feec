"""An image of a guest that worked in a real QEMU, and QEMUs that it is served to."""

import contextlib
import itertools
import shutil
from pathlib import Path

import numpy as np

from fakes.commands import postcopy
from interop.arrival import check_memory, iterations, wait_until_beyond
from interop.qemu_guest import QemuGuest
from interop.test_from_qemu import send_to_qemu
from machine.machines import MIB, need
from postcopy.image.formats import open_image
from postcopy.image.manifest import beside
from postcopy.machine.workload import load

MEMORY_BYTES = 32 * MIB
WORKLOAD = load("hammer", MEMORY_BYTES, hot_bytes=8 * MIB)
POSTCOPY = ("events", "postcopy-ram")


class SavedInQemu:
    """An image that ``postcopy snapshot --from`` has taken of a QEMU, and where its guest was then."""

    def __init__(self, folder: Path, *options: str) -> None:
        need("kvm")
        self.folder = folder
        self.path = folder / "image"
        qmp = f"unix:{folder / 'qmp'}"
        more = ["-qmp", f"{qmp},server=on,wait=off"]
        with QemuGuest(folder / "first", "microvm", "kvm", MEMORY_BYTES, more=more) as qemu:
            send_to_qemu(WORKLOAD, qemu)
            outcome = postcopy("snapshot", "--from", qmp, str(self.path), *options)
            assert (outcome.returncode, outcome.stderr) == (0, "")
        with open_image(self.path) as image:
            self.blocks = {block.name: block.pages for block in image.blocks}
            self.left_at = iterations(self.read, WORKLOAD)
        self._numbers = itertools.count()

    def pages(self, block: str) -> np.ndarray:
        with open_image(self.path) as image:
            return image.read(block, 0, self.blocks[block])

    def read(self, address: int, length: int) -> bytes:
        """Read the guest's memory out of the image."""
        with open_image(self.path) as image:
            first, end = address // 4096, -(-(address + length) // 4096)
            rows = image.read("microvm.ram", first, end - first).reshape(-1)
        start = address - first * 4096
        return rows[start : start + length].tobytes()

    def copy(self, folder: Path) -> Path:
        """Copy it, with its manifest, to be damaged."""
        path = folder / "copy"
        shutil.copy(self.path, path)
        shutil.copy(beside(self.path), beside(path))
        return path

    @contextlib.contextmanager
    def target(self, accelerator="kvm", *capabilities, more=()):
        """A QEMU that waits for it, and the URI to serve it at."""
        number = next(self._numbers)
        folder = self.folder / f"target-{number}"
        with QemuGuest(folder, "microvm", accelerator, MEMORY_BYTES, more=more) as qemu:
            qemu.capabilities(*POSTCOPY, *capabilities)
            yield qemu, qemu.listen(f"unix:{folder}/way")

    def check_goes_on(self, qemu: QemuGuest) -> None:
        """The guest counts on in QEMU, and every page of it is right; it stands still then."""
        wait_until_beyond(qemu.read_memory, WORKLOAD, self.left_at)
        qemu("stop")
        check_memory(qemu.read_memory, WORKLOAD)

    def check_equal(self, qemu: QemuGuest, dump: Path) -> None:
        """A guest that has not run has the memory of the image, all of it."""
        qemu("pmemsave", val=0, size=MEMORY_BYTES, filename=str(dump))
        np.testing.assert_array_equal(
            np.fromfile(dump, np.uint8).reshape(-1, 4096), self.pages("microvm.ram")
        )


def flip(path: Path) -> None:
    """Turn one byte of the guest's memory in an image, or turn it back."""
    with open_image(path) as image:
        at = image.place("microvm.ram").pages_offset + (24 << 20)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0] ^ 0xFF
        file.seek(at)
        file.write(bytes([byte]))
