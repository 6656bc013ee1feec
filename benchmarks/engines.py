"""The two engines behind one small class: a process, its monitor, its guest's memory."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from benchmarks.clock import Clock, rdtsc
from benchmarks.qmp import Qmp, QmpFailed
from benchmarks.shaped_link import ShapedLink
from benchmarks.workload import Workload

_LOG_TAIL_CHARACTERS: Final = 600
_CREDENTIALS: Final = "tls0"

CERTIFIED_HOST: Final = "localhost"
"""Whom the certificates of a run name."""


class GuestMemory:
    """Guest memory below 3 GiB through ``/proc/PID/mem``: no monitor in the way, the guest runs on.

    A page that has not arrived gives OSError (EIO) and is not waited for.
    """

    def __init__(self, pid: int, ram_at: int) -> None:
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        self._ram_at = ram_at

    def read(self, address: int, n_bytes: int) -> bytes:
        """See :class:`benchmarks.workload.Memory`."""
        found = b""
        while len(found) < n_bytes:
            at = self._ram_at + address + len(found)
            part = os.pread(self._fd, n_bytes - len(found), at)
            if not part:
                raise OSError(f"guest memory ends at {address + len(found):#x}")
            found += part
        return found

    def write(self, address: int, data: bytes) -> None:
        """Write to a page that is there."""
        os.pwrite(self._fd, data, self._ram_at + address)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


@dataclass(frozen=True)
class Setup:
    """What every process of one run has in common; ``directory`` has its sockets and logs.

    :param huge_pages: the guest's memory is of 2 MiB pages from the host's pool.
    :param link: what joins source and destination; None: loopback.
    """

    directory: Path
    accelerator: str
    memory_mib: int
    workload: Workload
    clock: Clock
    huge_pages: bool = False
    link: ShapedLink | None = None


@dataclass(frozen=True)
class Awakening:
    """An image to wake a guest from, and options of the command line that does."""

    image: Path
    options: tuple[str, ...] = ()


class Engine:
    """A source with the measuring guest in it, a destination that waits for one, or one that wakes.

    :ivar began: host TSC just before the process was started.
    """

    title: ClassVar[str]

    def __init__(self, role: str, setup: Setup, awakening: Awakening | None = None) -> None:
        self.role = role
        self._setup = setup
        self._memory: GuestMemory | None = None
        self._log = setup.directory / f"{role}.log"
        qmp_path = setup.directory / f"{role}.qmp"
        if awakening is not None:
            command = self.waking_command(setup, qmp_path, awakening)
        else:
            command = self.command(setup, qmp_path, incoming=role == "destination")
        if setup.link is not None:
            command = [*setup.link.prefix(role), *command]
        self.began = rdtsc()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self.qmp = Qmp(qmp_path, lambda: self.process.poll() is None)
        except QmpFailed as error:
            self.process.kill()
            self.process.wait()
            raise QmpFailed(f"{self.title}, {role}: {error}\n{self.log_tail()}") from None
        if awakening is None:
            self.set_capabilities("events")

    @classmethod
    def command(cls, setup: Setup, qmp_path: Path, *, incoming: bool) -> list[str]:
        """The command line; writes the guest's image to the run's directory where one is needed."""
        raise NotImplementedError

    @classmethod
    def waking_command(cls, setup: Setup, qmp_path: Path, awakening: Awakening) -> list[str]:
        """The command line that wakes a guest from an image with mapped-ram at once."""
        raise NotImplementedError

    @classmethod
    def version(cls) -> str:
        """One line that says what was measured."""
        raise NotImplementedError

    def set_capabilities(self, *names: str) -> None:
        """Switch migration capabilities on."""
        wanted = [{"capability": name, "state": True} for name in names]
        self.qmp.execute("migrate-set-capabilities", capabilities=wanted)

    def encrypt(self, certificates: Path) -> None:
        """Use TLS, with the certificates of a host ``localhost``."""
        endpoint = "client" if self.role == "source" else "server"
        self.qmp.execute(
            "object-add", qom_type="tls-creds-x509", id=_CREDENTIALS, dir=str(certificates),
            endpoint=endpoint, verify_peer=True,
        )  # fmt: skip
        self.qmp.execute(
            "migrate-set-parameters", tls_creds=_CREDENTIALS, tls_hostname=CERTIFIED_HOST
        )

    def info(self) -> dict[str, Any]:
        """The answer to ``query-migrate``."""
        answer: dict[str, Any] = self.qmp.execute("query-migrate")
        return answer

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory."""
        if self._memory is None:
            answer = self.qmp.hmp("gpa2hva 0x7000")
            self._memory = GuestMemory(self.process.pid, int(answer.split()[-1], 16) - 0x7000)
        return self._memory

    def event_tsc(self, name: str, status: str | None = None) -> int | None:
        """The host TSC at an event, by the engine's own timestamp; None if there was none."""
        event = self.qmp.find_event(name, status)
        if event is None:
            return None
        stamp = event["timestamp"]
        return self._setup.clock.from_wall_clock(stamp["seconds"], stamp["microseconds"])

    def log_tail(self) -> str:
        """The end of what the process said."""
        return self._log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:].strip()

    def close(self) -> None:
        """End the process and all that belongs to it."""
        if self._memory is not None:
            self._memory.close()
        self.process.kill()
        self.process.wait()
        self.qmp.close()


class Qemu(Engine):
    """A real QEMU, as its users start it: machine ``pc``, memory as it comes."""

    title = "QEMU"
    executable: ClassVar = "qemu-system-x86_64"

    @classmethod
    def command(cls, setup: Setup, qmp_path: Path, *, incoming: bool) -> list[str]:
        """See :class:`Engine`."""
        disk = setup.directory / "boot.img"
        if not incoming:
            disk.write_bytes(setup.workload.disk(setup.clock.hz))
        return [
            *(cls.executable, "-display", "none", "-nodefaults", *cls._machine(setup)),
            *("-accel", setup.accelerator, "-m", str(setup.memory_mib), "-smp", "1"),
            *("-qmp", f"unix:{qmp_path},server=on,wait=off"),
            *("-drive", f"file={disk},format=raw,if=none,id=boot,readonly=on"),
            *("-device", "virtio-blk-pci,drive=boot"),
            *(("-incoming", "defer") if incoming else ()),
        ]

    @classmethod
    def _machine(cls, setup: Setup) -> list[str]:
        if not setup.huge_pages:
            return ["-machine", "pc"]
        memory = (
            f"memory-backend-memfd,id=pc.ram,size={setup.memory_mib}M,hugetlb=on,hugetlbsize=2M"
        )
        return ["-object", memory, "-machine", "pc,memory-backend=pc.ram"]

    @classmethod
    def waking_command(cls, setup: Setup, qmp_path: Path, awakening: Awakening) -> list[str]:
        """See :class:`Engine`."""
        return [
            *cls.command(setup, qmp_path, incoming=False),
            *("-global", "migration.mapped-ram=on", "-incoming", f"file:{awakening.image}"),
            *awakening.options,
        ]

    @classmethod
    def version(cls) -> str:
        """See :class:`Engine`."""
        if shutil.which(cls.executable) is None:
            return ""
        return _first_line([cls.executable, "--version"])


class Postcopy(Engine):
    """Our machine and engine, as this checkout has them."""

    title = "postcopy"

    @classmethod
    def command(cls, setup: Setup, qmp_path: Path, *, incoming: bool) -> list[str]:
        """See :class:`Engine`."""
        image = setup.directory / "measure.bin"
        if not incoming:
            image.write_bytes(setup.workload.image(setup.clock.hz))
        return [
            *(sys.executable, "-m", "postcopy", "run", "--accel", setup.accelerator),
            *("--memory", f"{setup.memory_mib}M", "--smp", "1", "--monitor", "none"),
            *("--qmp", f"unix:{qmp_path}"),
            *(("--huge-pages",) if setup.huge_pages else ()),
            *(("--incoming", "defer") if incoming else ("--image", str(image))),
        ]

    @classmethod
    def waking_command(cls, setup: Setup, qmp_path: Path, awakening: Awakening) -> list[str]:
        """See :class:`Engine`."""
        return [
            *(sys.executable, "-m", "postcopy", "restore", str(awakening.image), "--lazy"),
            *("--accel", setup.accelerator, "--monitor", "none", "--qmp", f"unix:{qmp_path}"),
            *awakening.options,
        ]

    @classmethod
    def version(cls) -> str:
        """See :class:`Engine`."""
        described = _first_line(["git", "describe", "--always", "--dirty"])
        return f"postcopy {described or 'of unknown revision'}"


def _first_line(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.split("\n", 1)[0]
