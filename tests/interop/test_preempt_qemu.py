"""The preempt channel between us and a real QEMU, in both roles."""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from faults.relay import Relay
from interop.arrival import (
    check_arrived,
    check_goes_on,
    check_memory,
    iterations,
    wait_until_beyond,
)
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu(*ALL)
WHOLE = pytest.param(False, id="whole", marks=pytest.mark.proves(Way.FROM, Feature.PREEMPT))
BROKEN = pytest.param(
    True, id="broken", marks=pytest.mark.proves(Way.FROM, Feature.PREEMPT_RECOVERY)
)
TO = pytest.mark.proves(Way.TO, Feature.PREEMPT)

MEMORY_BYTES = 32 * MIB
PREEMPT = (Capability.POSTCOPY_RAM, Capability.POSTCOPY_PREEMPT)
SLOW = {"max-bandwidth": 20 * MIB, "downtime-limit": 0, "max-postcopy-bandwidth": 2 * MIB}


@pytest.fixture
def workload():
    need("kvm")
    return workloads.load("hammer", MEMORY_BYTES, 2, hot_bytes=8 * MIB)


@pytest.fixture
def qemu(tmp_path):
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES, 2) as qemu:
        yield qemu


@pytest.fixture
def relay():
    with Relay("tcp:127.0.0.1:0", "tcp:127.0.0.1:1") as relay:
        yield relay


def leave(ours, qemu, relay):
    """Our guest sets out for QEMU, and runs there before most of its pages have come."""
    qemu.capabilities("postcopy-ram", "postcopy-preempt")
    ours.switch_on(*PREEMPT)
    ours.migration.set_parameters(SLOW)
    relay.target = qemu.listen("tcp:127.0.0.1:0")
    ours.migration.migrate(relay.uri)
    ours.migration.start_postcopy()
    ours.migration.progress.wait(Status.POSTCOPY_ACTIVE, timeout=20)


def check_completed(ours, workload, qemu):
    assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
    check_arrived(qemu, workload, ours)


@TO
def test_to_qemu(workload, qemu, relay):
    with OurGuest.running(workload, "kvm") as ours:
        leave(ours, qemu, relay)
        ours.migration.set_parameters({"max-postcopy-bandwidth": 0})
        check_completed(ours, workload, qemu)
        assert len(relay.recorded(connection=1)) >= 4096
        assert "ignoring" not in qemu.log


@pytest.mark.proves(Way.TO, Feature.PREEMPT_RECOVERY)
@pytest.mark.parametrize("connection", [0, 1], ids=["main", "preempt"])
def test_to_qemu_with_a_break(workload, qemu, relay, connection):
    with OurGuest.running(workload, "kvm") as ours:
        leave(ours, qemu, relay)
        wait_until(lambda: len(relay.recorded(connection=1)) > 40_000, 20, "requested pages")
        relay.connections[connection].close()
        ours.migration.progress.wait(Status.POSTCOPY_PAUSED, timeout=20)
        qemu.wait_migration("postcopy-paused")
        qemu("migrate-recover", uri="tcp:127.0.0.1:0")
        (address,) = qemu("query-migrate")["socket-address"]
        ours.migration.set_parameters({"max-postcopy-bandwidth": 0})
        ours.migration.migrate(f"tcp:{address['host']}:{address['port']}", resume=True)
        ours.migration.progress.wait(Status.POSTCOPY_ACTIVE, Status.COMPLETED, timeout=20)
        check_completed(ours, workload, qemu)


def test_a_qemu_without_it_is_refused(workload, qemu, relay):
    with OurGuest.running(workload, "kvm") as ours:
        qemu.capabilities("postcopy-ram")
        ours.switch_on(*PREEMPT)
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0", exit_on_error=False))
        ours.migration.start_postcopy()
        assert ours.wait_end() is Status.FAILED
        assert "is postcopy-preempt switched on there?" in ours.error
        read = ours.machine.read_memory
        wait_until_beyond(read, workload, iterations(read, workload))


@pytest.mark.parametrize("broken", [WHOLE, BROKEN])
def test_from_qemu(tmp_path, workload, qemu, relay, broken):
    with (
        OurGuest.running(workload, "kvm") as first,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        first.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        assert first.wait_end() is Status.COMPLETED, (first.error, qemu.log)
        qemu.wait_migration("completed")
        wait_until_beyond(
            qemu.read_memory, workload, iterations(first.machine.read_memory, workload)
        )
        qemu.capabilities("postcopy-ram", "postcopy-preempt")
        ours.switch_on(*PREEMPT)
        relay.target = ours.listen("tcp:127.0.0.1:0")
        qemu.send_by_postcopy(relay.uri, max_postcopy_bandwidth=MIB)
        ours.migration.progress.wait(Status.POSTCOPY_ACTIVE, timeout=20)
        if broken:
            wait_until(lambda: len(relay.recorded(connection=1)) > 40_000, 20, "requested pages")
            relay.break_all()
            ours.migration.progress.wait(Status.POSTCOPY_PAUSED, timeout=20)
            qemu.wait_migration("postcopy-paused")
            ours.migration.recover("tcp:127.0.0.1:0")
            (address,) = ours.migration.info().socket_address
            qemu.parameters(max_postcopy_bandwidth=0)
            qemu("migrate", uri=f"tcp:127.0.0.1:{address['port']}", resume=True)
        qemu.parameters(max_postcopy_bandwidth=0)
        ours.migration.progress.wait(Status.COMPLETED, timeout=30)
        qemu.wait_migration("completed")
        read = ours.machine.read_memory
        check_goes_on(read, workload, iterations(qemu.read_memory, workload))
        ours.machine.stop()
        check_memory(read, workload)
        assert len(relay.recorded(connection=1)) >= 4096
