"""A real QEMU whose guest runs: takes a stream from a file, and shows its memory.

:class:`fakes.real_qemu.RealQemu` is for streams whose guest never runs; here the guest does.
"""

import itertools
import json
import os
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fakes.qemu_versions import BINARY
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


def need(accelerator: str) -> None:
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm: run as root or join group kvm")


class QemuMachine:
    """``machine`` is a name of ``MACHINES``; a folder holds its firmware: an endless HLT."""

    def __init__(self, machine: str, accelerator: str, folder: Path, *arguments: str) -> None:
        need(accelerator)
        options, self.block = MACHINES[machine]
        command = [BINARY, "-display", "none", "-nodefaults", "-accel", accelerator, *options]
        command += ["-m", f"{MEMORY_BYTES >> 20}M"]
        if machine != "none":
            firmware = bytearray(64 << 10)
            firmware[0xFFF0:0xFFF3] = b"\xf4\xeb\xfd"
            (folder / "firmware").write_bytes(firmware)
            command += ["-bios", str(folder / "firmware")]
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(TIMEOUT_S)
        command += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "qmp,mode=control"]
        self._log = folder / "qemu.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        self._lines = self._ours.makefile("r")
        self._ids = itertools.count()
        self("qmp_capabilities")

    def __enter__(self) -> "QemuMachine":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._lines.close()
        self._ours.close()

    def __call__(self, command: str, **arguments):
        number = next(self._ids)
        order = {"execute": command, "id": number, "arguments": arguments}
        self._ours.sendall(json.dumps(order).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "return" in answer, answer
                return answer["return"]
        raise AssertionError(f"QEMU went away: {self._log.read_text()}")

    def word(self, address: int) -> int:
        """Eight bytes of the guest's physical memory."""
        text = self("human-monitor-command", **{"command-line": f"xp /1gx {address:#x}"})
        return int(text.split()[1], 16)

    def wait_running(self) -> None:
        wait_until(lambda: self("query-status")["status"] == "running", TIMEOUT_S, "running")

    def migrate_to(self, path: Path) -> bytes:
        """Everything that it sends."""
        self("migrate", uri=f"file:{path}")

        def done() -> bool:
            info = self("query-migrate")
            assert info.get("status") != "failed", info
            return info.get("status") == "completed"

        wait_until(done, TIMEOUT_S, "migrated")
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
    at = stream.index(b"\x04\0\0\0\0\x05timer")
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


def description_of(stream: bytes) -> dict:
    """The JSON at the end of a stream that QEMU wrote."""
    return json.loads(stream[stream.index(b'{"configuration"') :].rstrip(b"\0"))
