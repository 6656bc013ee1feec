"""Something that nobody knows, on a live connection between two processes, as a newer source might say it.

The destination refuses it by its name and its place in the stream, and the guest goes on where it is.
"""

import struct

import pytest

from fakes.commands import DEADLINE_S, Running, need_kvm, pair
from fakes.waiting import wait_until
from faults.fault_channel import FaultChannel, NamedRecord
from postcopy.machine import workload
from postcopy.machine.workload_records import read_record

pytestmark = pytest.mark.kvm

RAM_ID = struct.pack(">I", 2)
END_OF_SECTION = NamedRecord("end of a section", struct.pack(">Q", 0x10) + b"\x7e" + RAM_ID)
"""Behind it, in the midst of precopy, any element may come."""

NAME = b"flux-capacitor"
SECTION = b"\x04" + struct.pack(">IB", 77, len(NAME)) + NAME + struct.pack(">II", 0, 1)
UNKNOWN = {
    "type": (b"\x55", 0, "Unknown savevm section type 85"),
    "part": (b"\x02" + struct.pack(">I", 77), 1, "Unknown savevm section 77"),
    "device": (SECTION, len(SECTION), "Unknown savevm section or instance 'flux-capacitor' 0"),
    "flag": (
        b"\x02" + RAM_ID + struct.pack(">Q", 0x400),
        5,
        "Unknown combination of migration flags: 0x400",
    ),
    "command": (b"\x08" + struct.pack(">HH", 99, 0), 0, "MIG_CMD 0x63 unknown"),
}
"""What is said, the place in it that is at fault (of a device: where its state is), what is named."""


@pytest.fixture
def processes(tmp_path):
    """A guest that never stands still, and who waits for it."""
    need_kvm()
    with pair(tmp_path, "hammer") as (source, target):
        slow = {"max-bandwidth": 16 << 20, "downtime-limit": 0}
        assert "return" in source.ask("migrate-set-parameters", **slow)
        yield source, target


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy-ram"])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_is_refused_by_name_and_place_and_the_guest_goes_on(tmp_path, processes, kind, postcopy):
    source, target = processes
    data, at, says = UNKNOWN[kind]
    if postcopy:
        wanted = [{"capability": "postcopy-ram", "state": True}]
        for side in processes:
            assert "return" in side.ask("migrate-set-capabilities", capabilities=wanted)
    way = f"unix:{tmp_path}/way"
    assert "return" in target.ask("migrate-incoming", uri=way, **{"exit-on-error": False})
    with FaultChannel(f"unix:{tmp_path}/channel", way) as channel:
        fault = channel.inject(END_OF_SECTION, data)
        assert "return" in source.ask("migrate", uri=channel.uri)
        fault.wait()
        for side in processes:
            wait_until(lambda s=side: s.migration_status() == "failed", DEADLINE_S, "the end")
        stream = channel.recorded()
    error = target.ask("query-migrate")["return"]["error-desc"]
    assert says in error
    assert "\n" not in error
    place = stream.index(END_OF_SECTION.begin + data) + len(END_OF_SECTION.begin) + at
    assert f"(at byte {place:#x})" in error
    assert source.ask("query-migrate")["return"]["error-desc"]
    assert target.ask("query-status")["return"]["status"] == "inmigrate"
    goes_on(source)


def goes_on(side: Running):
    """Its guest writes on, and can still move."""
    assert side.ask("query-status")["return"]["status"] == "running"
    guest = workload.load("hammer", 64 << 20)

    def done():
        return read_record(lambda address, n: read(side, address, n), 0).iterations

    assert guest.vcpus == 1
    before = done()
    wait_until(lambda: done() > before, DEADLINE_S, "the guest stands still")


def read(side: Running, address: int, length: int) -> bytes:
    """Guest memory, by the monitor."""
    line = f"xp /{length}xb {address:#x}"
    told = side.ask("human-monitor-command", **{"command-line": line})["return"]
    words = [word for row in told.splitlines() for word in row.partition(":")[2].split()]
    return bytes(int(word, 16) for word in words)
