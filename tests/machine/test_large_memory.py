"""Machines of more than 3 GiB: one block, in two parts where QEMU's microvm has its hole for devices.

They are sparse: only what their guests touch takes memory of the host.
"""

from itertools import pairwise

import numpy as np
import pytest

from fakes.waiting import wait_until
from machine.machines import MIB, Watched, config_for, need, wait_for_progress, wait_for_work
from postcopy.errors import Refused
from postcopy.machine import boot, oracle, workload
from postcopy.machine.address_map import AddressMap
from postcopy.machine.config import MOST_MEMORY_BYTES, MachineConfig
from postcopy.machine.run_control import RunState

GIB = 1 << 30
PAGE = 4096


def writes_to(address):
    """A guest that writes a word there and switches itself off."""
    # mov rdx, address; mov qword [rdx], 0x55; mov al, 5; out 0xf4, al; jmp $
    return b"\x48\xba" + address.to_bytes(8, "little") + bytes.fromhex("48c70255000000b005e6f4ebfe")


def around(seam, accelerator, memory_bytes=5 * GIB):
    """A hammer whose slices lie on either side of an address."""
    fill = 16 * MIB if accelerator == "kvm" else MIB
    base = seam - fill // 2
    return workload.load("hammer", memory_bytes, 2, fill_bytes=fill, base_address=base)


@pytest.fixture(params=["kvm", "unicorn"])
def accelerator(request):
    need(request.param)
    return request.param


class TestAddressMap:
    @pytest.mark.parametrize("size", [2 * MIB, 3 * GIB - 2 * MIB, 3 * GIB])
    def test_what_fits_under_the_hole_is_in_one_piece(self, size):
        assert AddressMap.with_hole(size) == AddressMap.flat(size)
        assert AddressMap.flat(size).end_address == size

    @pytest.mark.parametrize("size", [3 * GIB + 2 * MIB, 4 * GIB, 5 * GIB, 64 * GIB])
    def test_the_rest_stands_from_4_gib_on(self, size):
        # As "info mtree" of QEMU 10 shows for a microvm of these sizes.
        found = AddressMap.with_hole(size)
        assert found.end_address == size + GIB
        assert found.offset_of(3 * GIB - 8, 8) == 3 * GIB - 8
        assert found.offset_of(4 * GIB, 8) == 3 * GIB
        assert found.offset_of(size + GIB - 8, 8) == size - 8

    @pytest.mark.parametrize(
        ("address", "length"),
        [(3 * GIB, 1), (3 * GIB - 1, 2), (4 * GIB - 1, 2), (6 * GIB, 1), (-1, 2), (0, 5 * GIB)],
    )
    def test_no_ram_there(self, address, length):
        where = r"it is at \[0x0, 0xc0000000\) and \[0x100000000, 0x180000000\)"
        with pytest.raises(Refused, match=where):
            AddressMap.with_hole(5 * GIB).offset_of(address, length)

    @pytest.mark.parametrize("make", [AddressMap.flat, AddressMap.with_hole])
    def test_blocks_follow_one_another(self, make):
        """Each part is of one block; a range may reach through several."""
        sizes = (2 * MIB, 3 * GIB, 2 * MIB, 4 * MIB)
        found, whole = make(*sizes), make(sum(sizes))
        ends = np.cumsum(sizes).tolist()
        for end in ends:
            assert any(part.end_offset == end for part in found.parts)
        assert sum(part.size_bytes for part in found.parts) == sum(sizes)
        for offset in (0, 2 * MIB, 3 * GIB, *ends[:-1]):
            address = whole.address_of(offset)
            assert found.address_of(offset) == address
            assert found.offset_of(address, 8) == offset
        assert found.offset_of(2 * MIB - 4, 8) == 2 * MIB - 4
        assert found.end_address == whole.end_address


class TestPageTables:
    @pytest.mark.parametrize("size", [2 * MIB, 3 * GIB, 3 * GIB + 2 * MIB, 4 * GIB])
    def test_up_to_4_gib_they_lie_below_0x7000(self, size):
        tables = list(boot.page_tables(AddressMap.with_hole(size)))
        assert max(address + len(table) for address, table in tables) <= boot.RESERVED_END
        assert boot.reserved(size) == [(0, boot.RESERVED_END)]

    @pytest.mark.parametrize("size", [4 * GIB + 2 * MIB, 5 * GIB, MOST_MEMORY_BYTES])
    def test_the_others_lie_where_no_image_may(self, size):
        places = [place for place, _ in boot.page_tables(AddressMap.with_hole(size))]
        assert len(set(places)) == len(places)
        for place in places:
            assert any(a <= place < b for a, b in boot.reserved(size)), hex(place)

    @pytest.mark.parametrize("make", [AddressMap.flat, AddressMap.with_hole])
    @pytest.mark.parametrize("size", [6 * MIB, 5 * GIB + 2 * MIB, MOST_MEMORY_BYTES])
    def test_a_guest_finds_the_block_in_one_piece(self, make, size):
        addresses = make(size)
        memory = dict(boot.page_tables(addresses))
        for offset in (0, 2 * MIB, 3 * GIB - 8, 3 * GIB, 4 * GIB, 5 * GIB - 8, size - 8):
            if offset < size:
                assert addresses.offset_of(walk(memory, offset), 1) == offset
        assert walk(memory, size) is None


def walk(memory, virtual):
    """The physical address of a virtual one, as the processor finds it; None without one."""
    table = boot.PML4_ADDRESS
    for shift in (39, 30, 21):
        words = np.frombuffer(memory[table], "<u8")
        number = virtual >> shift & 511
        entry = int(words[number]) if number < len(words) else 0
        if not entry & 1:
            return None
        table = entry & ~0xFFF
    return table + (virtual & 2 * MIB - 1)


@pytest.mark.parametrize("machine_type", ["microvm", "none"])
@pytest.mark.parametrize("seam", [3 * GIB, 4 * GIB, 5 * GIB - 8 * MIB])
def test_a_guest_works_around_the_seams(accelerator, machine_type, seam):
    work = around(seam, accelerator)
    with Watched(config_for(work, accelerator, machine_type=machine_type)) as watched:
        machine = watched.machine
        (region,) = machine.regions()
        assert (region.size_bytes, region.guest_address) == (5 * GIB, 0)
        parts = [(part.offset, part.length_bytes, part.address) for part in region.physical_ranges]
        split = [(0, 3 * GIB, 0), (3 * GIB, 2 * GIB, 4 * GIB)]
        assert parts == (split if machine_type == "microvm" else [(0, 5 * GIB, 0)])
        machine.start()
        wait_for_work(machine, work)
        wait_for_progress(machine, work)
        machine.pause()
        found = oracle.verify(machine.read_memory, work)
        assert found.ok, found


@pytest.mark.parametrize(
    ("machine_type", "offset", "physical"),
    [
        ("microvm", 3 * GIB - 8, 3 * GIB - 8),
        ("microvm", 3 * GIB, 4 * GIB),
        ("microvm", MOST_MEMORY_BYTES - 8, MOST_MEMORY_BYTES + GIB - 8),
        ("none", 3 * GIB, 3 * GIB),
        ("none", MOST_MEMORY_BYTES - 8, MOST_MEMORY_BYTES - 8),
    ],
)
def test_physical_addresses(accelerator, machine_type, offset, physical):
    config = MachineConfig(
        MOST_MEMORY_BYTES, accel=accelerator, image=writes_to(offset), machine_type=machine_type
    )
    with Watched(config) as watched:
        machine = watched.machine
        machine.start()
        wait_until(lambda: machine.run_state is not RunState.RUNNING)
        assert machine.run_state is RunState.SHUTDOWN, machine.failure
        assert machine.read_memory(offset, 8) == b"U" + bytes(7)
        assert machine.read_physical(physical, 8) == b"U" + bytes(7)
        assert machine.host_address(physical) == machine.regions()[0].host_address + offset


def test_beyond_its_memory_a_guest_finds_nothing(accelerator):
    config = MachineConfig(5 * GIB, accel=accelerator, image=writes_to(5 * GIB))
    with Watched(config) as watched:
        watched.machine.start()
        wait_until(lambda: watched.machine.run_state is RunState.INTERNAL_ERROR)


def test_the_dirty_log_is_one_of_the_whole_block():
    need("kvm")
    work = around(3 * GIB, "kvm")
    with Watched(config_for(work, "kvm")) as watched:
        machine = watched.machine
        machine.start()
        wait_for_work(machine, work)
        machine.start_dirty_log()
        machine.fetch_dirty_log(machine.config.ram_name)
        wait_for_progress(machine, work)
        machine.pause()
        log = machine.fetch_dirty_log(machine.config.ram_name)
        assert len(log) == 5 * GIB // PAGE // 8
        dirty = np.flatnonzero(np.unpackbits(log, bitorder="little"))
        records = {0x20, 0x21, 0x22, 0x23}
        slices = [work.slice_address(vcpu) // PAGE for vcpu in range(3)]
        assert slices[1] == 3 * GIB // PAGE
        for first, end in pairwise(slices):
            assert [page for page in dirty if first <= page < end], (first, end)
        assert all(slices[0] <= page < slices[2] for page in {*dirty.tolist()} - records)
        assert not machine.fetch_dirty_log(machine.config.ram_name).any()
        machine.stop_dirty_log()
