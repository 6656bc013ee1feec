"""A real QEMU: started, spoken to over QMP, and killed."""

import functools
import itertools
import json
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fakes.qemu_versions import BINARY
from fakes.waiting import wait_until

TIMEOUT_S = 30.0
BIOS_BYTES = 64 << 10
FILE_URIS = (8, 2)
"""The version that brought them."""

MICROVM = "microvm,pit=off,pic=off,rtc=off,isa-serial=off,acpi=off,auto-kernel-cmdline=off"
MACHINES = {"none": ("none", "ram"), "microvm": (MICROVM, "microvm.ram")}
"""Name on the wire: what ``-M`` wants, and the name of the RAM block."""


class QmpRefused(Exception):
    """QEMU answered a command with an error."""


class QemuGone(AssertionError):
    """QEMU has ended, and its log says why."""


class QemuProcess:
    """One QEMU, whatever its machine; ``events`` keeps all that came while answers were read.

    :param oob: commands can be given by :meth:`oob`, too.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], *, oob: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(TIMEOUT_S)
        command = [BINARY, "-display", "none", "-nodefaults", *arguments]
        command += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "qmp,mode=control"]
        self._log = folder / "qemu.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[theirs.fileno()]
            )
        theirs.close()
        self._lines = self._ours.makefile("r")
        self._ids = itertools.count()
        self.events: list[dict] = []
        try:
            self("qmp_capabilities", **({"enable": ["oob"]} if oob else {}))
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __call__(self, command: str, **arguments):
        """Do one QMP command and give what it returns; events are put aside."""
        return self._do("execute", command, arguments)

    def oob(self, command: str, **arguments):
        """Do one out of band: QEMU answers it even if its main loop waits for a page."""
        return self._do("exec-oob", command, arguments)

    def _do(self, how: str, command: str, arguments: dict):
        number = next(self._ids)
        order = {how: command, "id": number, "arguments": arguments}
        try:
            self._ours.sendall(json.dumps(order).encode() + b"\n")
            for line in self._lines:
                answer = json.loads(line)
                if "event" in answer:
                    self.events.append(answer)
                elif answer.get("id") == number:
                    if "return" not in answer:
                        raise QmpRefused(answer["error"]["desc"])
                    return answer["return"]
        except ConnectionError:
            pass  # it has ended, and its log says why
        self._process.wait()  # its log is whole
        raise QemuGone(f"QEMU went away: {self.log}")

    @functools.cached_property
    def version(self) -> tuple[int, int]:
        """Such as ``(10, 0)``."""
        found = self("query-version")["qemu"]
        return found["major"], found["minor"]

    @property
    def log(self) -> str:
        """What QEMU has written to its standard output and error."""
        return self._log.read_text()

    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self._process.poll() is None

    def wait_end(self) -> None:
        """Wait until its guest has switched it off."""
        assert self._process.wait(2 * TIMEOUT_S) == 0, self.log

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it, and let go of what belongs to it."""
        self.kill()
        self._lines.close()
        self._ours.close()

    def capabilities(self, *names: str) -> None:
        """Switch capabilities on."""
        states = [{"capability": name, "state": True} for name in names]
        self("migrate-set-capabilities", capabilities=states)

    def save(self, path: Path) -> dict:
        """Have its state written to a file, and give the last ``query-migrate``."""
        if self.version >= FILE_URIS:
            self("migrate", uri=f"file:{path}")
            return self.wait_migration("completed")
        # What it has written, a command may still be reading.
        part = path.with_name(f"{path.name}.part")
        self("migrate", uri=f"exec:cat >{part} && mv {part} {path}")
        info = self.wait_migration("completed")
        wait_until(path.exists, TIMEOUT_S, "the command's end")
        return info

    def loading(self, path: Path) -> str:
        """The URI by which it loads a file."""
        return f"file:{path}" if self.version >= FILE_URIS else f"exec:cat {path}"

    def begin_move(self, target: "QemuProcess", folder: Path) -> None:
        """Begin to migrate to another, with postcopy allowed; the socket is made in a folder."""
        for qemu in (self, target):
            qemu.capabilities("events", "postcopy-ram")
        uri = f"unix:{folder / 'migration'}"
        target("migrate-incoming", uri=uri)
        self("migrate", uri=uri)

    def sent(self) -> int:
        """Bytes of its migration so far."""
        return self("query-migrate").get("ram", {}).get("transferred", 0)

    def why_failed(self) -> str:
        """All that it says of a migration to it that has failed; some QEMUs have ended then."""
        try:
            return self.wait_migration("failed").get("error-desc", "") + self.log
        except QemuGone:
            return self.log

    def wait_migration(self, status: str) -> dict:
        """Wait until ``query-migrate`` says so."""
        info = {}

        def reached() -> bool:
            info.update(self("query-migrate"))
            assert info.get("status") != "failed" or status == "failed", info
            return info.get("status") == status

        wait_until(reached, TIMEOUT_S, f"migration {status}")
        return info


class RealQemu(QemuProcess):
    """One QEMU whose RAM is a private mapping of ``ram``, a file; its guest never runs."""

    def __init__(self, machine: str, ram: Path, folder: Path, *arguments: str) -> None:
        option, block = MACHINES[machine]
        size = ram.stat().st_size
        command = ["-S", "-accel", "tcg"]
        command += ["-M", f"{option},memory-backend={block}", "-m", f"{size >> 20}M"]
        command += ["-object", f"memory-backend-file,id={block},mem-path={ram},size={size},"
                    "share=off,x-use-canonical-path-for-ramblock-id=off"]  # fmt: skip
        if machine == "microvm":
            command += bios(folder)
        super().__init__(folder, [*command, *arguments])


def bios(folder: Path) -> list[str]:
    """The arguments for a firmware that does nothing: a microvm does not start without one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bios"
    path.write_bytes(bytes(BIOS_BYTES))
    return ["-bios", str(path)]
