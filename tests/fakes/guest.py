"""A guest for a destination that runs in the test's own process: memory, and notes of what was asked."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from postcopy.channel.address import FdAddress
from postcopy.channel.listen import Listener
from postcopy.destination.destination import Destination
from postcopy.destination.incoming_ram import Populating
from postcopy.errors import HostCannot
from postcopy.guest import AddressSpace, MappedRange, Region, SharingProcess, VcpuThread
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import MISSING_FEATURES, MISSING_MODE, Userfaultfd
from postcopy.link.rpc import Answer
from postcopy.machine.device_formats import FORMATS
from postcopy.memory import page_map_file
from postcopy.paging.ram import IncomingRam
from postcopy.parameters import Capabilities, Parameters
from postcopy.status import Status, StatusMachine

RAM = "microvm.ram"


def need_missing_pages() -> None:
    """Skip a test where userfaultfd cannot tell of missing pages."""
    try:
        Userfaultfd.open(MISSING_FEATURES).close()
    except HostCannot as reason:
        pytest.skip(str(reason))


class AskedPages(list):
    """As a source of pages: keeps what it is asked for."""

    request = list.extend


class FakeGuest:
    """The owner's side of a guest that never runs, so that nobody ever touches missing memory.

    :ivar calls: what an engine has asked, in order.
    """

    machine_name = "microvm"

    def __init__(
        self, memory_bytes: int, page_size_bytes: int = 4096, *, in_pool: bool = False
    ) -> None:
        self._size = memory_bytes
        self._page_size = page_size_bytes
        huge = {"huge_page_size": page_size_bytes} if in_pool else {}
        self._fd = memfd.create(RAM, memory_bytes, **huge)
        self._mapping = Mapping.shared(self._fd, memory_bytes)
        self._missing: Userfaultfd | None = None
        self.sharing: list[SharingProcess] = []
        self.calls: list[str] = []
        self.devices: list[str] = []

    def close(self) -> None:
        self.unwatch_missing()
        self._mapping.close()
        os.close(self._fd)

    def memory(self) -> bytes:
        return os.pread(self._fd, self._size, 0)

    def regions(self) -> list[Region]:
        return [Region(RAM, self._size, self._page_size, 0, self._mapping.address, self._fd)]

    def shared_with(self) -> list[SharingProcess]:
        return self.sharing

    def tell_of_sharing(self, joined: Callable[[SharingProcess], None]) -> None:
        self.joined = joined

    def incoming_ram(self) -> IncomingRam:
        (region,) = self.regions()
        regions = [replace(region, fd=os.dup(self._fd))]
        self._ram = IncomingRam(regions, [page_map_file.create(self._size // self._page_size)])
        return self._ram

    def touch(self, page: int) -> bytes:
        """Read a little of a page as the guest would; waits while it is missing."""
        return self._mapping.read(page * self._page_size, 8)

    # --- as postcopy.guest.Guest

    def vcpu_threads(self):
        return (VcpuThread(0, 1),)

    def resume(self):
        self.calls.append("resume")

    def begin_to_resume(self):
        self.resume()
        resuming = Answer()
        resuming.give(None)
        return resuming

    def load_devices(self, states):
        self.devices += [state.name for state in states]

    def watch_missing(self):
        self._missing = Userfaultfd.open(MISSING_FEATURES)
        self._missing.register(self._mapping.address, self._size, MISSING_MODE)
        ranges = [MappedRange(RAM, 0, self._size, self._mapping.address)]
        return [AddressSpace(os.getpid(), ranges, os.dup(self._missing.fd))]

    def open_userfaultfd(self) -> Userfaultfd:
        """What an engine makes of it."""
        (space,) = self.watch_missing()
        return Userfaultfd.from_fd(space.userfaultfd)

    def populate(self, block, offset, length_bytes):
        pass

    def unmap_missing(self):
        self._mapping.discard(0, self._size)

    def unwatch_missing(self):
        if self._missing is not None:
            self._missing.unregister(self._mapping.address, self._size)
            self._missing.close()
            self._missing = None


class LocalDestination:
    """A destination in this process that reads from one descriptor, until its stream ends."""

    def __init__(
        self,
        fd: int,
        memory_bytes: int,
        capabilities: Capabilities,
        *,
        parameters: Parameters | None = None,
        guest: type[FakeGuest] = FakeGuest,
    ) -> None:
        self.guest = guest(memory_bytes)
        self.statuses: list[Status] = []
        self._ram = ram = self.guest.incoming_ram()
        populating = Populating(self.guest, ram, 0)
        populating.start()
        self.job = Destination(
            self.guest,
            FORMATS,
            Listener(FdAddress(fd)),
            ram,
            populating,
            capabilities,
            StatusMachine(self.statuses.append, Status.SETUP),
            parameters,
        )

    def run(self) -> Status:
        """Take all that comes; return how it ended."""
        self.job.run()
        return self.statuses[-1]

    def close(self) -> None:
        """Let go of what a paused postcopy has kept."""
        self.job._postcopy.close()
        if self.statuses[-1:] == [Status.POSTCOPY_PAUSED]:  # else it has done so itself
            self._ram.close()
        self.guest.close()
