"""A shadow of a hammered guest's memory, kept by a tracker alone, is the memory in the end."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from machine.drives import disk_workload, make_disk
from machine.machines import MIB, config_for, need, wait_for_work
from postcopy.dirty.pagemap import PagemapTracker
from postcopy.dirty.tracker import KvmLogTracker, choose
from postcopy.errors import Refused
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.machine.machine import Machine
from postcopy.machine.workload import load
from postcopy.memory.ram_block import RamBlock

ROUNDS = 12
CHUNK_PAGES = 1000  # neither a power of two nor a divisor of the memory


@pytest.fixture(
    params=[
        ("kvm", 1, True, False),
        ("kvm", 4, True, False),
        ("kvm", 2, False, False),
        ("unicorn", 1, True, False),
        ("kvm", 2, True, True),
        ("unicorn", 1, True, True),
    ],
    ids=["kvm", "kvm-4", "kvm-2-small-pages", "unicorn", "kvm-2-drive", "unicorn-drive"],
)
def hammered(request, tmp_path):
    accelerator, vcpus, huge, drive = request.param
    need(accelerator)
    fill = 8 * MIB if accelerator == "kvm" else MIB // 2
    workload = load("hammer", 32 * MIB, vcpus, fill_bytes=fill, hot_bytes=fill)
    if drive:
        workload = disk_workload(accelerator, vcpus)
    config = config_for(
        workload,
        accelerator,
        transparent_huge_pages=huge,
        drive=make_disk(tmp_path / "disk") if drive else None,
    )
    with Machine(config) as machine:
        machine.start()
        wait_for_work(machine, workload)
        yield machine


@pytest.fixture
def block(hammered):
    (region,) = hammered.regions()
    fd = os.dup(region.fd)
    made = RamBlock(type(region)(**{n: getattr(region, n) for n in region.__slots__} | {"fd": fd}))
    yield made
    made.close()


@pytest.mark.parametrize("kind", [PagemapTracker, KvmLogTracker])
def test_the_shadow_is_the_memory(hammered, block, kind):
    if kind is KvmLogTracker and hammered.accelerator_name != "kvm":
        with pytest.raises(Refused, match="needs a guest on KVM; use pagemap"):
            choose("kvm", SimpleNamespace(kvm=False))
        return
    tracker = kind(GuestKeeper(hammered))
    tracker.start()
    shadow = block.pages.copy()
    found = 0
    for _ in range(ROUNDS):
        for start in range(0, block.page_count, CHUNK_PAGES):
            found += follow(tracker, block, shadow, start)
    hammered.pause()
    left = tracker.collect(block, 0, block.page_count, protect=False)
    again = tracker.collect(block, 0, block.page_count, protect=False)
    assert (left & ~again).sum() == 0  # told of again, since it was not protected
    shadow[left] = block.pages[left]
    assert (shadow == block.pages).all()
    assert found > 0
    tracker.stop()


def follow(tracker, block, shadow, start):
    end = min(start + CHUNK_PAGES, block.page_count)
    written = np.flatnonzero(tracker.collect(block, start, end, protect=True)) + start
    shadow[written] = block.pages[written]
    return len(written)


@pytest.mark.parametrize("kind", [PagemapTracker, KvmLogTracker])
def test_a_guest_that_stands_still_writes_nothing(hammered, block, kind):
    if kind is KvmLogTracker and hammered.accelerator_name != "kvm":
        return
    tracker = kind(GuestKeeper(hammered))
    tracker.start()
    hammered.pause()
    tracker.collect(block, 0, block.page_count, protect=True)
    assert not tracker.collect(block, 0, block.page_count, protect=True).any()
    tracker.stop()
