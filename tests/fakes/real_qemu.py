"""A real QEMU: started, spoken to over QMP, and killed.  Its guest never runs (``-S``)."""

import itertools
import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from fakes.waiting import wait_until

BINARY = "qemu-system-x86_64"
TIMEOUT_S = 30.0
BIOS_BYTES = 64 << 10

MICROVM = "microvm,pit=off,pic=off,rtc=off,isa-serial=off,acpi=off,auto-kernel-cmdline=off"
MACHINES = {"none": ("none", "ram"), "microvm": (MICROVM, "microvm.ram")}
"""Name on the wire: what ``-M`` wants, and the name of the RAM block."""


class RealQemu:
    """One QEMU whose RAM is a private mapping of ``ram``, a file."""

    def __init__(self, machine: str, ram: Path, folder: Path, *arguments: str) -> None:
        if shutil.which(BINARY) is None:
            pytest.skip(f"needs {BINARY}: run .ci/install-qemu")
        option, block = MACHINES[machine]
        folder.mkdir(parents=True, exist_ok=True)
        size = ram.stat().st_size
        command = [BINARY, "-display", "none", "-nodefaults", "-S", "-accel", "tcg"]
        command += ["-M", f"{option},memory-backend={block}", "-m", f"{size >> 20}M"]
        command += ["-object", f"memory-backend-file,id={block},mem-path={ram},size={size},"
                    "share=off,x-use-canonical-path-for-ramblock-id=off"]  # fmt: skip
        if machine == "microvm":
            (folder / "bios").write_bytes(bytes(BIOS_BYTES))
            command += ["-bios", str(folder / "bios")]
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

    def __enter__(self) -> "RealQemu":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        self._lines.close()
        self._ours.close()

    def __call__(self, command: str, **arguments):
        """Do one QMP command and give what it returns; events are dropped."""
        number = next(self._ids)
        order = {"execute": command, "id": number, "arguments": arguments}
        self._ours.sendall(json.dumps(order).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "return" in answer, answer
                return answer["return"]
        raise AssertionError(f"QEMU went away: {self._log.read_text()}")

    def capabilities(self, *names: str) -> None:
        """Switch capabilities on."""
        states = [{"capability": name, "state": True} for name in names]
        self("migrate-set-capabilities", capabilities=states)

    def wait_migration(self, status: str) -> dict:
        """Wait until ``query-migrate`` says so."""
        info = {}

        def reached() -> bool:
            info.update(self("query-migrate"))
            assert info.get("status") != "failed" or status == "failed", info
            return info.get("status") == status

        wait_until(reached, TIMEOUT_S, f"migration {status}")
        return info
