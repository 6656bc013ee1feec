"""Checks of a guest that has moved: it goes on counting, and not a page of it is wrong."""

from fakes.waiting import wait_until
from interop.our_guest import OurGuest
from postcopy.machine import oracle, workload_records
from postcopy.machine.workload import Workload
from postcopy.machine.workload_records import Read
from postcopy.status import Status

GOES_ON_S = 30


def iterations(read: Read, workload: Workload) -> list[int]:
    """How far each vCPU has come."""
    return [record.iterations for record in workload_records.read_records(read, workload)]


def wait_until_beyond(read: Read, workload: Workload, before: list[int]) -> None:
    """Until every vCPU has come further than ``before``."""

    def beyond() -> bool:
        now = iterations(read, workload)
        return all(a > b for a, b in zip(now, before, strict=True))

    wait_until(beyond, GOES_ON_S, "the guest does not go on counting")


def check_goes_on(read: Read, workload: Workload, left_at: list[int]) -> None:
    """It has come beyond where it left, and does so again."""
    wait_until_beyond(read, workload, left_at)
    wait_until_beyond(read, workload, iterations(read, workload))


def check_memory(read: Read, workload: Workload) -> None:
    """Of a guest that stands still: every page of the workload."""
    found = oracle.verify(read, workload)
    assert found.ok, found
    assert found.pages_checked > workload.pages


def check_arrived(qemu, workload, ours) -> None:
    """Our guest runs in QEMU, whole, and no longer here; it stands still then."""
    qemu.wait_migration("completed")
    check_goes_on(qemu.read_memory, workload, iterations(ours.machine.read_memory, workload))
    assert not ours.machine.running
    assert not ours.machine.owned
    qemu("stop")
    check_memory(qemu.read_memory, workload)


def check_back(ours, workload, qemu) -> None:
    """A guest has come back from QEMU, whole, and runs here; it stands still then."""
    assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
    qemu.wait_migration("completed")
    read = ours.machine.read_memory
    check_goes_on(read, workload, iterations(qemu.read_memory, workload))
    assert ours.machine.owned
    ours.machine.stop()
    check_memory(read, workload)


def send_to_qemu(workload, qemu):
    """Bring our guest into QEMU, where it works on."""
    with OurGuest.running(workload, "kvm") as ours:
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        left_at = iterations(ours.machine.read_memory, workload)
    qemu.wait_migration("completed")
    wait_until_beyond(qemu.read_memory, workload, left_at)
