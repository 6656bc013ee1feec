"""A sample of the transports with a real QEMU; ``tests/journeys/test_transports.py`` has them all."""

import pytest

from fakes import carry
from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from interop.arrival import check_arrived, check_goes_on, check_memory, iterations, send_to_qemu
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu(*ALL)

MEMORY_BYTES = 32 * MIB
PRECOPY = ()
ANSWERED = (Capability.RETURN_PATH,)
POSTCOPY = (Capability.RETURN_PATH, Capability.POSTCOPY_RAM)
proves = pytest.mark.proves
EXEC = proves(Way.FROM, Feature.EXEC)


def hammer():
    return workloads.load("hammer", MEMORY_BYTES, 1, hot_bytes=4 * MIB)


def a_qemu(tmp_path):
    need("kvm")
    return QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES)


@pytest.mark.parametrize(
    ("way", "on"),
    [
        pytest.param(
            "exec",
            ANSWERED,
            id="command, answered",
            marks=proves(Way.TO, Feature.EXEC, Feature.ANSWERED),
        ),
        pytest.param("exec", POSTCOPY, id="command, postcopy", marks=proves(Way.TO, Feature.EXEC)),
        pytest.param("tcp6", POSTCOPY, id="IPv6, postcopy", marks=proves(Way.TO, Feature.TCP6)),
    ],
)
def test_to_qemu(tmp_path, way, on):
    workload = hammer()
    with (
        a_qemu(tmp_path) as qemu,
        OurGuest.running(workload, "kvm", machine_type="microvm") as ours,
    ):
        qemu.capabilities(*(name.value for name in on))
        ours.switch_on(*on)
        if way == "exec":
            uri = carry.command(qemu.listen(f"unix:{tmp_path}/door"))
        else:
            uri = qemu.listen("tcp:[::1]:0")
        if on is POSTCOPY:
            ours.send_by_postcopy(uri)
        else:
            ours.migration.migrate(uri)
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)


@proves(Way.TO, Feature.SAVED)
@pytest.mark.parametrize(
    "accelerator", [pytest.param("kvm"), pytest.param("tcg", marks=proves(Way.TO, Feature.TCG))]
)
def test_qemu_loads_the_stream_that_we_saved(tmp_path, accelerator):
    workload = hammer()
    path = tmp_path / "saved"
    with (
        QemuGuest(tmp_path, "microvm", accelerator, MEMORY_BYTES) as qemu,
        OurGuest.running(workload, "kvm", machine_type="microvm") as ours,
    ):
        ours.migration.migrate(f"file:{path}")
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        qemu.listen(qemu.loading(path))
        check_arrived(qemu, workload, ours)


@pytest.mark.parametrize(
    ("way", "on"),
    [
        pytest.param(
            "exec",
            ANSWERED,
            id="command, answered",
            marks=[EXEC, proves(Way.FROM, Feature.ANSWERED)],
        ),
        pytest.param("exec", POSTCOPY, id="command, postcopy", marks=EXEC),
        pytest.param(
            "file", PRECOPY, id="file behind an offset", marks=proves(Way.FROM, Feature.FILE)
        ),
        pytest.param("tcp6", POSTCOPY, id="IPv6, postcopy", marks=proves(Way.FROM, Feature.TCP6)),
    ],
)
def test_back_from_qemu(tmp_path, way, on):
    workload = hammer()
    with a_qemu(tmp_path) as qemu, OurGuest.waiting(workload, "kvm") as ours:
        send_to_qemu(workload, qemu)
        qemu.parameters(max_bandwidth=1 << 40)
        qemu.capabilities(*(name.value for name in on))
        ours.switch_on(*on)
        if way == "file":
            uri = f"file:{tmp_path}/saved,offset=0x1000"
            qemu("migrate", uri=uri)
            qemu.wait_migration("completed")
            ours.listen(uri)
        else:
            if way == "exec":
                uri = carry.command(ours.listen(f"unix:{tmp_path}/door"))
            else:
                ours.migration.incoming("tcp:[::1]:0")
                uri = f"tcp:[::1]:{ours.migration.info().socket_address[0]['port']}"
            if on is POSTCOPY:
                qemu.send_by_postcopy(uri)
            else:
                qemu("migrate", uri=uri)
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        qemu.wait_migration("completed")
        assert ("postcopy-active" in ours.events) is (on is POSTCOPY)
        check_goes_on(ours.machine.read_memory, workload, iterations(qemu.read_memory, workload))
        assert ours.machine.owned
        ours.machine.stop()
        check_memory(ours.machine.read_memory, workload)
