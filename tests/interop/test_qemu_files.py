"""Files of a stock QEMU with a PC, devices and firmware: read, and written anew so that it loads them."""

from pathlib import Path

import numpy as np
import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.real_qemu import MICROVM, QemuProcess, bios
from fakes.waiting import wait_until
from image.test_convert import convert
from interop.arrival import send_to_qemu
from interop.qemu_guest import QemuGuest
from interop.test_receive_qemu import MEMORY_BYTES, How, memory_of, migrate
from machine.machines import need
from postcopy.errors import ImageError
from postcopy.image.device_fields import device_fields
from postcopy.image.extract import choose_ranges, extract
from postcopy.image.formats import open_image
from postcopy.image.records import read_records
from postcopy.machine import workload as workloads
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
        qemu("migrate", uri=f"exec:cat >{path}")
        wait_until(lambda: is_whole(path), 30, "a whole stream")
    with open_image(path) as image:
        rows = image.read("pc.ram", LOADED_AT // 4096, 1024)
        np.testing.assert_array_equal(rows, contents())


def is_whole(path: Path) -> bool:
    try:
        open_image(path).close()
    except ImageError:
        return False
    return True


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


class TestPhysicalMemory:
    """What ``extract`` writes is what QEMU's own ``pmemsave`` does."""

    def compare(self, tmp_path, qemu, path, ranges) -> None:
        flat = tmp_path / "flat"
        with open_image(path) as image:
            extract(image, choose_ranges(image, None), flat)
        assert flat.stat().st_size == ranges[-1][1]
        for start, end in ranges:
            dump = tmp_path / "dump"
            qemu("pmemsave", val=start, size=end - start, filename=str(dump))
            with flat.open("rb") as file:
                file.seek(start)
                assert file.read(end - start) == dump.read_bytes()
            dump.unlink()

    @pytest.mark.parametrize("board", ["q35", "pc"])
    @pytest.mark.proves(Way.FROM, Feature.IMAGES)
    def test_in_two_parts_under_the_firmware(self, tmp_path, board):
        with machine(tmp_path, f"{board},max-ram-below-4g=32M") as qemu:
            qemu.save(tmp_path / "image")
            ranges = [(0, 0xA0000), (0xC0000, 32 * MIB), (4 << 30, (4 << 30) + 32 * MIB)]
            self.compare(tmp_path, qemu, tmp_path / "image", ranges)

    @pytest.mark.proves(Way.FROM, Feature.IMAGES)
    def test_of_a_microvm(self, tmp_path):
        contents().tofile(tmp_path / "loaded")
        loader = f"loader,file={tmp_path / 'loaded'},addr={LOADED_AT:#x},force-raw=on"
        folder = tmp_path / "qemu"
        line = ["-S", "-accel", "tcg", "-M", MICROVM, "-m", "32M", "-device", loader]
        with QemuProcess(folder, [*line, *bios(folder)]) as qemu:
            qemu.save(tmp_path / "image")
            self.compare(tmp_path, qemu, tmp_path / "image", [(0, 32 * MIB)])

    @pytest.mark.qemu("10.0")
    def test_of_3_gib(self, tmp_path):
        """By the rule of the board, where the hole is; the mapped file has next to no pages."""
        contents().tofile(tmp_path / "loaded")
        loader = f"loader,file={tmp_path / 'loaded'},addr={(4 << 30) + MIB:#x},force-raw=on"
        line = ["-S", "-accel", "tcg", "-M", "q35", "-m", "3G", "-device", loader]
        with QemuProcess(tmp_path / "qemu", line) as qemu:
            mapped(qemu)
            qemu.save(tmp_path / "image")
        with open_image(tmp_path / "image") as image:
            ranges = choose_ranges(image, None)
            assert [(each.address, each.end) for each in ranges[-2:]] == [
                (MIB, 2 << 30),
                (4 << 30, 5 << 30),
            ]
            at = (ranges[-1].block_offset + MIB) // 4096
            np.testing.assert_array_equal(image.read("pc.ram", at, 1024), contents())


@pytest.mark.proves(Way.FROM, Feature.IMAGES)
def test_devices_by_the_names_of_their_fields(tmp_path):
    with machine(tmp_path, "q35") as qemu:
        qemu.save(tmp_path / "image")
        registers = qemu("human-monitor-command", **{"command-line": "info registers"})
    with open_image(tmp_path / "image") as image:
        devices = {each.name: each.fields for each in device_fields(image)}
        assert len(devices) == len(image.sections)
    cpu = devices["cpu 0"]
    assert f"EIP={cpu['env.eip']:08x}" in registers
    assert f"EDX={cpu['env.regs'][2]:08x}" in registers
    assert f"CR0={cpu['env.cr[0]']:08x}" in registers
    assert devices["mc146818rtc 0"]["cmos_data"][2 * 0x34 : 2 * 0x36] == "0003"  # 48 MiB above 16


@pytest.mark.qemu("10.0")
def test_deltas_of_a_guest_that_writes(tmp_path):
    """Of xbzrle: each is against what the stream has had of the page before."""
    need("kvm")
    path = tmp_path / "image"
    workload = workloads.load("hammer", MEMORY_BYTES, 1, hot_bytes=4 * MIB)
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu:
        send_to_qemu(workload, qemu)
        for _ in range(10):  # a busy host: the guest may have slept
            migrate(qemu, How(("xbzrle",)), f"exec:cat >{path}")
            wait_until(lambda: is_whole(path), 30, "the command's end")
            records = []
            read_records(path, records.append)
            if deltas := [each for each in records if each.kind == "xbzrle"]:
                break
            qemu("cont")
        assert deltas
        memory = memory_of(qemu, tmp_path, MEMORY_BYTES)
    with open_image(path) as image:
        np.testing.assert_array_equal(image.read("microvm.ram", 0, len(memory)), memory)
