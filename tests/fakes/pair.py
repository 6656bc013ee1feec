"""Two machines with their migration subsystems in one process, and a guest that moves between them.

The engines are processes of their own, as always.  Everything waits with a deadline, and closing a
:class:`Journey` ends all of it, also when the test has failed half-way.
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fakes import engine_template
from fakes.stacks import stacks
from fakes.stopping import stop_process
from fakes.waiting import wait_until
from machine.drives import check_disk
from machine.machines import (
    MIB,
    config_for,
    need,
    wait_for_progress,
    wait_for_work,
    wait_for_writes,
)
from machine.networks import check_net
from postcopy.channel.address import TcpAddress
from postcopy.events import Event, EventBus
from postcopy.link.guest.control import MigrationControl
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.link.guest.watchdog import HANG_LOOKS
from postcopy.machine import oracle
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.memory_blocks import MemoryBlock
from postcopy.machine.workload import PAGE_BYTES, Workload, load
from postcopy.memory.page_map import PageMap
from postcopy.parameters import Capability
from postcopy.status import Status

DEADLINE_S = 30.0
POSTCOPY = (Capability.POSTCOPY_RAM, Capability.POSTCOPY_BLOCKTIME)
QUICK: Mapping[str, object] = {"max-bandwidth": 1 << 40, "downtime-limit": 10_000}
"""Even a hammered guest converges, on a busy host too, and whatever was set before."""
NEVER_ENDS: Mapping[str, object] = {"max-bandwidth": 16 << 20, "downtime-limit": 0}
"""A hammered guest never converges; a round over it takes a quarter of a second.

Faster, and a vCPU that has to wait for a busy host's CPU may write nothing in a whole round.
"""
TRICKLE: Mapping[str, object] = NEVER_ENDS | {
    "max-bandwidth": 1 << 20,
    "max-postcopy-bandwidth": 64 << 10,
}
"""After switchover, the push takes minutes: there is time to break it.

Precopy is slow too: on a busy host it would otherwise have brought nearly everything before it hears
of the order to switch over, and the little that is left would arrive at once.
"""


def hammer(memory_mib: int = 64, vcpus: int = 1, *, fill_kib: int = 8192) -> Workload:
    """Writes at full speed to half of what it has filled."""
    fill = fill_kib << 10
    return load("hammer", memory_mib * MIB, vcpus, fill_bytes=fill, hot_bytes=fill // 2)


def idle(memory_mib: int = 64, vcpus: int = 1, *, fill_kib: int = 4096) -> Workload:
    return load("idle", memory_mib * MIB, vcpus, fill_bytes=fill_kib << 10)


def tiny(accelerator: str, vcpus: int = 1) -> Workload:
    """What an accelerator fills and hammers in a moment."""
    return hammer(64, vcpus, fill_kib=8192 if accelerator == "kvm" else 512)


class Side:
    """One machine with its migration subsystem, and all that it told."""

    def __init__(
        self,
        config: MachineConfig,
        *,
        incoming: bool = False,
        paused: bool = False,
        kind=Machine,
        hang_looks: int = HANG_LOOKS,
    ) -> None:
        self.incoming = incoming
        self.events: list[Event] = []
        self.failures: list[str] = []
        self.bus = bus = EventBus()
        bus.subscribe(self.events.append)
        self.machine = kind(config, on_event=bus.emit)
        self.control = MigrationControl(
            self.machine,
            bus,
            incoming=incoming,
            on_incoming_failed=self.failures.append,
            hang_looks=hang_looks,
        )
        self.set((Capability.EVENTS,))
        self.machine.start(incoming=incoming, paused=paused)
        self.control.prepare()

    def set(
        self,
        capabilities: Iterable[Capability] = (),
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        changes = dict.fromkeys(capabilities, True)
        if changes:
            self.control.set_capabilities(changes)
        if parameters:
            self.control.set_parameters(parameters)

    def use_tls(self, folder: Path, **parameters: object) -> None:
        """Encrypt the next migration with the certificates in a folder."""
        endpoint = "server" if self.incoming else "client"
        arguments = {"dir": str(folder), "endpoint": endpoint}
        self.control.objects.add("tls-creds-x509", "tls", arguments)
        self.set(parameters={"tls-creds": "tls", "tls-hostname": "localhost"} | parameters)

    @property
    def status(self) -> Status:
        return self.control.progress.status

    @property
    def error(self) -> str | None:
        return self.control.info().error_desc

    def wait(self, *wanted: Status, timeout_s: float = DEADLINE_S) -> Status:
        """Until the status is one of these; any other end of the migration fails at once."""
        ends = {Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.POSTCOPY_PAUSED}
        found = self.until(*wanted, *ends, timeout_s=timeout_s)
        assert found in wanted, f"{found.value}: {self.error}"
        return found

    def until(self, *wanted: Status, timeout_s: float = DEADLINE_S) -> Status:
        """Until the status is one of these; what all threads do is told if it does not come."""
        try:
            return self.control.progress.wait(*wanted, timeout=timeout_s)
        except TimeoutError as late:
            names = [status.value for status in wanted]
            raise AssertionError(f"not {names}: {late}; {self.story()}\n{stacks()}") from late

    def wait_rounds(self, rounds: int) -> None:
        """Until so many rounds of precopy are done."""

        def reached() -> bool:
            info = self.control.info()
            assert info.status in {Status.SETUP, Status.ACTIVE}, info
            return info.ram is not None and info.ram.dirty_sync_count > rounds

        wait_until(reached, DEADLINE_S, f"{rounds} rounds")

    def listen(self, uri: str = "tcp:127.0.0.1:0") -> str:
        """Wait for a guest; return where the other side has to connect to."""
        self.control.incoming(uri, exit_on_error=False)
        where = self.control.info().socket_address
        if where and where[0]["type"] == "inet":
            return str(TcpAddress(where[0]["host"], int(where[0]["port"])))
        return uri

    def story(self) -> list[str]:
        """The events in order, in one word each: statuses, ``PASS n``, ``STOP``, ``RESUME``."""
        names = {"MIGRATION": "status", "MIGRATION_PASS": "pass"}
        told = []
        for event in tuple(self.events):
            key = names.get(event.name)
            word = str(event.data[key]) if key else event.name
            told.append(f"PASS {word}" if key == "pass" else word)
        return told

    @property
    def engine(self) -> EngineProcess | None:
        """The engine that works for this side now, to be killed or stopped by a test."""
        return self.control._engine

    @property
    def reset_engine(self) -> EngineProcess | None:
        """The engine of the reset point."""
        return self.control.resetting._engines.current

    @property
    def keeper(self) -> GuestKeeper:
        """The keeper of this side's guest: descriptors and page map."""
        return self.control._keeper

    def engine_process_id(self) -> int:
        assert self.engine is not None
        return self.engine.process_id

    def stop_engine(self) -> int:
        """As a debugger does; return its process."""
        process_id = self.engine_process_id()
        stop_process(process_id)
        return process_id

    def received(self) -> np.ndarray:
        """Which pages a destination has, as its page map says."""
        (fd,) = self.keeper._page_maps
        (region,) = self.machine.regions()
        pages = PageMap(os.dup(fd), region.size_bytes // region.page_size_bytes)
        have = ~pages.missing()
        pages.close()
        return have

    def ram(self) -> np.ndarray:
        """A copy of all memory as it is, page by page; what is missing reads as zeros.

        Read through the memfd, where no userfaultfd watches and holes stay holes.
        """
        return ram_of(self.machine)

    def close(self) -> None:
        self.control.close()
        # The process would end here.  A vCPU that waits for a page table cannot be parked before.
        service = self.keeper
        with service._lock:  # the engine's last call may be at work yet
            watches, maps = (service._missing, service._writes), service._page_maps
            service._missing = service._writes = None
            service._page_maps = []
        for watch in watches:
            if watch is not None:
                watch.close()
        self.machine.close()
        for fd in maps:
            os.close(fd)


@dataclass
class Journey:
    """A guest, where it is (``source``) and where it goes next (``destination``)."""

    workload: Workload
    accelerators: Sequence[str] = ("kvm", "kvm")
    capabilities: Iterable[Capability] = ()
    parameters: Mapping[str, object] = field(default_factory=lambda: dict(QUICK))
    paused: bool = False
    kind: type[Machine] = Machine
    huge_pages: bool = False
    blocks: Sequence[MemoryBlock] = ()
    transparent: Sequence[bool] = (True, True)
    hang_looks: int = HANG_LOOKS
    drive: str | None = None
    back_ends: Sequence[str] = ()
    """Sockets at which a source and a destination, in turn, find the drive, or the network."""
    tls: Path | None = None
    """A folder of certificates: all channels are encrypted."""

    def __post_init__(self) -> None:
        self.sides: list[Side] = []
        self._sockets = itertools.cycle(self.back_ends or (None,))
        for name in self.accelerators:
            need(name)
        config = config_for(
            self.workload,
            self.accelerators[0],
            huge_pages=self.huge_pages,
            blocks=self.blocks,
            transparent_huge_pages=self.transparent[0],
            **self._device(),
        )
        self.source = self._add(Side(config, hang_looks=self.hang_looks))
        self.source.set(self.capabilities, self.parameters)
        if self.tls is not None:
            self.source.use_tls(self.tls)
        self.destination = self.new_destination()
        wait_for_work(self.source.machine, self.workload)
        if self.paused:
            wait_for_writes(self.source.machine, self.workload)
            self.source.machine.stop()

    def __enter__(self) -> "Journey":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self.sides:
            self.sides.pop().close()

    def new_destination(self, **changes: object) -> Side:
        """Another machine to go to, in place of the one that failed or was left out."""
        config = MachineConfig(
            **{
                "memory_bytes": self.workload.memory_bytes,
                "vcpus": self.workload.vcpus,
                "accel": self.accelerators[-1],
                "huge_pages": self.huge_pages,
                "blocks": self.blocks,
                "transparent_huge_pages": self.transparent[-1],
            }
            | self._device()
            | changes
        )
        self.destination = self._add(
            Side(config, incoming=True, kind=self.kind, hang_looks=self.hang_looks)
        )
        self.destination.set(self.capabilities)
        if self.tls is not None:
            self.destination.use_tls(self.tls)
        return self.destination

    def migrate(self, uri: str = "tcp:127.0.0.1:0") -> None:
        """Begin."""
        self.source.control.migrate(self.destination.listen(uri))

    def finish(self) -> None:
        """Both sides complete, and the guest is at its destination with nothing lost."""
        self.source.wait(Status.COMPLETED)
        self.destination.wait(Status.COMPLETED)
        assert self.source.error is None
        assert self.destination.error is None
        assert not self.source.machine.owned
        assert not self.source.machine.running
        self.verify(self.destination)

    def verify(self, side: Side) -> None:
        """The guest works there, and each page of its memory is what it has made of it."""
        machine = side.machine
        assert machine.owned
        if not self.paused:
            assert machine.running
            wait_for_progress(machine, self.workload)
            machine.stop()
        self.check_memory(machine.read_memory)
        if self.workload.disk_blocks:
            check_disk(machine.read_memory, self.workload, machine.config.drive or self.drive)
        if self.workload.net_buffers:
            check_net(machine.read_memory, self.workload)
        end = self.workload.slice_address(self.workload.vcpus)
        for region in machine.regions():
            assert not any(
                os.pread(region.fd, stop - start, start).strip(b"\0")
                for start, stop in _data_extents(region.fd, region.size_bytes, max(end, 0))
            ), "memory that the guest never touched is not zero"
            end -= region.size_bytes
        if not self.paused:
            machine.cont()

    def check_memory(self, read) -> None:
        found = oracle.verify(read, self.workload)
        assert found.ok, found
        assert found.writes > 0 or self.workload.name == "idle"

    def verify_source(self) -> None:
        """The guest has stayed where it was, and all is well."""
        self.verify(self.source)

    def turn(self) -> None:
        """The guest has arrived: its destination is the next source."""
        self.turn_round(self.destination)
        self.source.set(self.capabilities, self.parameters)

    def turn_round(self, side: Side) -> None:
        """The guest is there: it goes on to a new destination, with nothing set."""
        if self.source is not side:
            self.source.close()
            self.source = side
            self.new_destination()

    def _device(self) -> dict[str, object]:
        """The virtio device that the next machine has."""
        kind, socket = "net" if self.workload.net_buffers else "blk", next(self._sockets)
        return {f"vhost_user_{kind}": str(socket)} if socket else {"drive": self.drive}

    def _add(self, side: Side) -> Side:
        self.sides.append(side)
        return side


def ram_of(machine: Machine) -> np.ndarray:
    """As :meth:`Side.ram`."""
    blocks = []
    for region in machine.regions():
        fd, size = region.fd, region.size_bytes
        blocks.append(memory := np.zeros(size, np.uint8))
        for start, end in _data_extents(fd, size):
            memory[start:end] = np.frombuffer(os.pread(fd, end - start, start), np.uint8)
    return (
        np.concatenate(blocks).reshape(-1, PAGE_BYTES)
        if blocks[1:]
        else memory.reshape(-1, PAGE_BYTES)
    )


def engines(of: int | None = None) -> list[int]:
    """The engine processes that a process, or this one, has started and that still are."""
    parents, templates = {}, set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if b"postcopy.engine" in command:
            parents[int(entry.name)] = parent
        if engine_template.COMMAND.encode() in command and parent == (of or os.getpid()):
            templates.add(int(entry.name))
    return [
        number
        for number, parent in parents.items()
        if number not in templates and parent in {of or os.getpid(), *templates}
    ]


def _data_extents(fd: int, size: int, start: int = 0) -> Iterable[tuple[int, int]]:
    while start < size:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole is left
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end
        start = end
