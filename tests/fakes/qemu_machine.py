"""A real QEMU whose guest runs: takes a stream from a file, and shows its memory.

:class:`fakes.real_qemu.RealQemu` is for streams whose guest never runs; here the guest does.
"""

import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fakes.real_qemu import QemuProcess
from fakes.waiting import wait_until
from postcopy.guest import DeviceState
from postcopy.stream.encoder import device_section, footer
from postcopy.stream.format_table import FormatTable
from postcopy.stream.records import DeviceSection

MICROVM = "microvm,pit=off,pic=off,rtc=off,isa-serial=off,acpi=off,auto-kernel-cmdline=off"
MACHINES = {
    "none": (["-M", "none", "-cpu", "qemu64,apic-id=0"], "ram"),
    "microvm": (["-M", MICROVM], "microvm.ram"),
    "microvm-serial": (
        ["-M", MICROVM.replace("isa-serial=off", "isa-serial=on"), "-serial", "null"],
        "microvm.ram",
    ),
}
MEMORY_BYTES = 4 << 20
PAGE = 4096
TIMEOUT_S = 30.0
_FIRST_DEVICE = re.compile(rb"\x04\0\0\0[\0-\x20](?:\x05timer|\x04apic)")
"""``apic`` is QEMU 11's."""
_DESCRIPTION = re.compile(rb'\x00\x06....(\{"(?:configuration|page_size)": .*\})\0*\Z', re.DOTALL)


def need(accelerator: str) -> None:
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm: run as root or join group kvm")


class QemuMachine(QemuProcess):
    """``machine`` is a name of ``MACHINES``; a folder holds its firmware: an endless HLT."""

    def __init__(self, machine: str, accelerator: str, folder: Path, *arguments: str) -> None:
        need(accelerator)
        options, self.block = MACHINES[machine]
        command = ["-accel", accelerator, *options]
        command += ["-m", f"{MEMORY_BYTES >> 20}M"]
        if machine != "none":
            firmware = bytearray(64 << 10)
            firmware[0xFFF0:0xFFF3] = b"\xf4\xeb\xfd"
            (folder / "firmware").write_bytes(firmware)
            command += ["-bios", str(folder / "firmware")]
        super().__init__(folder, [*command, *arguments])

    def word(self, address: int) -> int:
        """Eight bytes of the guest's physical memory."""
        text = self("human-monitor-command", **{"command-line": f"xp /1gx {address:#x}"})
        return int(text.split()[1], 16)

    def wait_running(self) -> None:
        wait_until(lambda: self("query-status")["status"] == "running", TIMEOUT_S, "running")

    def load(self, path: Path) -> None:
        """Take in a stream from a file; for one that was started with ``-incoming defer``."""
        self("migrate-incoming", uri=self.loading(path))

    def migrate_to(self, path: Path) -> bytes:
        """Everything that it sends."""
        self.save(path)
        return path.read_bytes()


def precopy_stream(
    machine: str, block: str, pages: Mapping[int, bytes], devices: Sequence[DeviceState]
) -> bytes:
    """A whole stream, written out here so that the devices are all that can be at fault."""
    name = machine.encode()
    counted = bytes([len(block)]) + block.encode()
    end_of_ram = struct.pack(">Q", 0x10) + footer(1)
    stream = b"QEVM" + struct.pack(">IBI", 3, 7, len(name)) + name
    stream += b"\x01\0\0\0\x01\x03ram" + struct.pack(">IIQ", 0, 4, MEMORY_BYTES | 4)
    stream += counted + struct.pack(">Q", MEMORY_BYTES) + end_of_ram
    stream += b"\x03\0\0\0\x01"
    for address, data in pages.items():
        stream += struct.pack(">Q", address | 8) + counted + data.ljust(PAGE, b"\0")
    stream += end_of_ram
    for number, state in enumerate(devices, 2):
        section = DeviceSection(number, state.name, state.instance, state.version, state.payload)
        stream += device_section(section)
    return stream + b"\0"


def devices_of(stream: bytes, formats: FormatTable) -> list[DeviceState]:
    """The FULL sections of a stream that QEMU wrote, cut where the table says."""
    first = _FIRST_DEVICE.search(stream)
    assert first
    at = first.start()
    found = []
    while stream[at] == 4:
        end = at + 6 + stream[at + 5]
        name = stream[at + 6 : end].decode()
        instance, version = struct.unpack_from(">II", stream, end)
        begin = end + 8
        length = formats.payload_length(name, instance, version, memoryview(stream)[begin:])
        assert length is not None
        found.append(DeviceState(name, instance, version, stream[begin : begin + length]))
        assert stream[begin + length] == 0x7E, name
        at = begin + length + 5
    assert stream[at] == 0
    return found


def description_of(stream: bytes) -> str:
    """The JSON at the end of a stream that QEMU wrote to a file; QEMU 7.2 tells of less."""
    found = _DESCRIPTION.search(stream)
    assert found
    return found[1].decode()
