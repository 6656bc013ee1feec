"""Memory is let go of step by step, and nobody who waits for it is forgotten."""

import ctypes
import mmap
import os
import threading
from types import SimpleNamespace

import pytest

from fakes.uffd_events import read_events
from fakes.waiting import wait_until
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.kernel.userfaultfd import SNAPSHOT_FEATURES, Userfaultfd
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.link.guest.sharing import STEP_BYTES

pytestmark = pytest.mark.userfaultfd

STEP = 16 << 20
SIZES = (2 * STEP + 4096, STEP, 4096)


@pytest.fixture
def guest():
    regions, memory = [], []
    for number, size in enumerate(SIZES):
        fd = memfd.create("test", size)
        memory.append(mmap.mmap(fd, size))
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory[-1]))
        regions.append(Region(f"ram{number}", size, 4096, 0, address, fd))
    yield SimpleNamespace(
        regions=lambda: regions, memory=memory, tell_of_sharing=id, shared_with=tuple
    )
    for region in regions:
        os.close(region.fd)


def test_no_call_lets_go_of_more_than_a_step(guest, monkeypatch):
    calls = []
    unregister = Userfaultfd.unregister

    def noted(self, address, length):
        calls.append((address, length))
        unregister(self, address, length)

    monkeypatch.setattr(Userfaultfd, "unregister", noted)
    service = GuestKeeper(guest)
    service.watch_snapshot()
    service.unwatch_snapshot()
    assert max(length for _, length in calls) == STEP_BYTES == STEP
    assert sum(length for _, length in calls) == sum(SIZES)
    calls.clear()
    service.watch_snapshot()  # nothing is watched any more: else this would be refused
    service.unwatch_snapshot()


def test_who_waits_to_write_goes_on_wherever_it_is(guest):
    service = GuestKeeper(guest)
    (space,) = service.watch_snapshot()
    watch = Userfaultfd(space.userfaultfd, SNAPSHOT_FEATURES)
    for region in guest.regions():
        watch.write_protect(region.host_address, region.size_bytes, protect=True)

    def write(region, offset):
        # A call that lets go of the interpreter lock: who waits under it would stop us all.
        ctypes.CDLL(None).memset(ctypes.c_void_p(region.host_address + offset), 7, 1)

    places = [
        (region, offset) for region in guest.regions() for offset in (0, region.size_bytes - 1)
    ]
    threads = [threading.Thread(target=write, args=place, daemon=True) for place in places]
    for thread in threads:
        thread.start()
    told = []
    wait_until(lambda: told.extend(read_events(watch)) or len(told) == len(threads))
    service.unwatch_snapshot()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert all(memory[0] == memory[-1] == 7 for memory in guest.memory)
