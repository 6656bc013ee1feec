"""Files of a stock QEMU with a PC, devices and firmware: read, and written anew so that it loads them."""

from pathlib import Path

import numpy as np
import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.real_qemu import QemuProcess
from fakes.waiting import wait_until
from image.test_convert import convert
from postcopy.image.formats import open_image
from postcopy.stream.numbers import SectionType

pytestmark = pytest.mark.qemu(*ALL)

MIB = 1 << 20
LOADED_AT = 1 << 20
MACHINE = ["-S", "-accel", "tcg", "-smp", "2", "-m", "64M", "-vga", "std"]
MACHINE += ["-device", "qemu-xhci", "-device", "virtio-net-pci,romfile="]


def contents() -> np.ndarray:
    rows = np.random.default_rng(4).integers(0, 256, (1024, 4096), dtype=np.uint8)
    rows[::3] = 0
    return rows


def machine(folder: Path, board: str, *more: str) -> QemuProcess:
    """A PC whose memory has something in it."""
    contents().tofile(folder / "loaded")
    loader = f"loader,file={folder / 'loaded'},addr={LOADED_AT:#x},force-raw=on"
    return QemuProcess(folder / "qemu", ["-M", board, *MACHINE, "-device", loader, *more])


def mapped(qemu: QemuProcess) -> None:
    if qemu.version < (9, 0):
        pytest.skip("this QEMU has no mapped-ram: 9.0 brought it")
    qemu.capabilities("mapped-ram")


@pytest.mark.parametrize("board", ["q35", "pc"])
@pytest.mark.proves(Way.FROM, Feature.IMAGES)
def test_a_pc_with_devices(tmp_path, board):
    path = tmp_path / "image"
    with machine(tmp_path, board) as qemu:
        qemu.save(path)
    with open_image(path) as image:
        assert image.machine_name.startswith("pc-")
        rows = image.read("pc.ram", LOADED_AT // 4096, 1024)
        np.testing.assert_array_equal(rows, contents())
        names = [section.name for section in image.sections]
        assert names.count("cpu") == 2
        assert any("virtio-net" in name for name in names)
        # The state of the devices is verbatim: it is what stands in front of the end.
        end = bytes([SectionType.EOF, SectionType.DESCRIPTION])
        assert image.device_bytes() + end in path.read_bytes()


@pytest.mark.proves(Way.FROM, Feature.MAPPED)
def test_a_pc_in_a_mapped_file(tmp_path):
    path = tmp_path / "image"
    with machine(tmp_path, "q35") as qemu:
        mapped(qemu)
        qemu.save(path)
    with open_image(path) as image:
        assert (image.format, image.configuration.capabilities) == ("mapped-ram", ())
        rows = image.read("pc.ram", LOADED_AT // 4096, 1024)
        np.testing.assert_array_equal(rows, contents())


@pytest.mark.proves(Way.FROM, Feature.IMAGES)
def test_a_source_that_may_go_over_to_postcopy(tmp_path):
    path = tmp_path / "image"
    with machine(tmp_path, "q35") as qemu:
        # It waits for an answer at the end of a stream that is whole.
        qemu.capabilities("postcopy-ram")
        qemu("migrate", uri=f"exec:cat >{path}.part && mv {path}.part {path}")
        wait_until(lambda: qemu.sent() and not remaining(qemu), 30, "all sent")
    wait_until(path.exists, 30, "the command's end")
    with open_image(path) as image:
        rows = image.read("pc.ram", LOADED_AT // 4096, 1024)
        np.testing.assert_array_equal(rows, contents())


def remaining(qemu: QemuProcess) -> int:
    return qemu("query-migrate")["ram"]["remaining"]


@pytest.mark.proves(Way.TO, Feature.SAVED)
def test_what_was_written_anew_loads(tmp_path):
    path = tmp_path / "image"
    with machine(tmp_path, "q35") as qemu:
        qemu.save(path)
        form = "mapped-ram" if qemu.version >= (9, 0) else "stream"
    again = convert(convert(path, tmp_path / "one", form), tmp_path / "two", "stream")
    dump = tmp_path / "dump"
    with machine(tmp_path, "q35", "-incoming", "defer") as qemu:
        qemu("migrate-incoming", uri=qemu.loading(again))
        qemu.wait_migration("completed")
        qemu("pmemsave", val=LOADED_AT, size=4 * MIB, filename=str(dump))
    assert dump.read_bytes() == contents().tobytes()
