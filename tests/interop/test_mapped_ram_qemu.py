"""Guests in mapped-ram files: QEMU loads ours, we load QEMU's, and each says why if it cannot."""

import json

import pytest

from fakes.page_cache import need_disk
from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.real_qemu import QmpRefused
from fakes.waiting import wait_until
from interop.arrival import check_goes_on, check_memory, iterations
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from interop.test_from_qemu import send_to_qemu
from machine.machines import MIB, need
from postcopy.errors import Refused
from postcopy.image.formats import open_image
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu(*ALL)
FILE = pytest.mark.proves(Way.TO, Feature.FILE)
TO = pytest.mark.proves(Way.TO, Feature.MAPPED)
FROM = pytest.mark.proves(Way.FROM, Feature.MAPPED)

MEMORY_BYTES = 32 * MIB


def hammer(vcpus=1):
    need("kvm")
    return workloads.load("hammer", MEMORY_BYTES, vcpus, hot_bytes=8 * MIB)


def save(ours, uri):
    ours.switch_on(Capability.MAPPED_RAM)
    ours.migration.migrate(uri)
    assert ours.wait_end() is Status.COMPLETED, ours.error
    return iterations(ours.machine.read_memory, ours.workload)


def ours_running(workload, **more):
    ours = OurGuest.running(workload, "kvm", **more)
    ours.workload = workload
    return ours


def check_at_qemu(qemu, workload, left_at):
    qemu.wait_migration("completed")
    check_goes_on(qemu.read_memory, workload, left_at)
    qemu("stop")
    check_memory(qemu.read_memory, workload)


@TO
@pytest.mark.parametrize(
    ("machine", "accelerator", "vcpus", "offset", "extra"),
    [
        ("microvm", "kvm", 1, "", ()),
        pytest.param("microvm", "kvm", 2, ",offset=0x1234", (), marks=FILE),
        ("microvm", "tcg", 1, "", ("multifd",)),
        ("none", "tcg", 1, "", ()),
    ],
)
def test_qemu_runs_what_we_saved(tmp_path, machine, accelerator, vcpus, offset, extra):
    workload = hammer(vcpus)
    uri = f"file:{tmp_path}/saved{offset}"
    with ours_running(workload, machine_type=machine) as ours:
        ours.switch_on(*map(Capability, extra))
        left_at = save(ours, uri)
    with QemuGuest(tmp_path, machine, accelerator, MEMORY_BYTES, vcpus) as qemu:
        qemu.capabilities("mapped-ram", *extra)
        qemu.listen(uri)
        check_at_qemu(qemu, workload, left_at)


@TO
def test_qemu_loads_a_stopped_guest_of_ours_to_the_last_byte(tmp_path):
    workload = hammer()
    uri = f"file:{tmp_path}/saved"
    with ours_running(workload) as ours:
        ours.machine.stop()
        left_at = save(ours, uri)
        memory = ours.machine.read_memory(0, MEMORY_BYTES)
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu:
        qemu.capabilities("mapped-ram")
        qemu.listen(uri)
        qemu.wait_migration("completed")
        assert qemu("query-status")["status"] == "paused"
        assert qemu.read_memory(0, MEMORY_BYTES) == memory
        qemu("cont")
        check_goes_on(qemu.read_memory, workload, left_at)


@FROM
@pytest.mark.parametrize(
    ("accelerator", "vcpus", "stopped", "extra"),
    [("kvm", 1, False, ()), ("kvm", 2, True, ("multifd",)), ("tcg", 1, False, ())],
)
def test_we_run_what_qemu_saved(tmp_path, accelerator, vcpus, stopped, extra):
    """Its blocks ``pc.bios`` and ``pc.rom`` are passed over."""
    workload = hammer(vcpus)
    path = tmp_path / "saved"
    with QemuGuest(tmp_path, "microvm", accelerator, MEMORY_BYTES, vcpus) as qemu:
        send_to_qemu(workload, qemu)
        qemu.capabilities("mapped-ram", *extra)
        qemu.parameters(max_bandwidth=1 << 40)
        if stopped:
            qemu("stop")
        qemu("migrate", uri=f"file:{path}")
        qemu.wait_migration("completed")
        left_at = iterations(qemu.read_memory, workload)
        memory = qemu.read_memory(0, MEMORY_BYTES)
    with OurGuest.waiting(workload, "kvm") as ours:
        ours.switch_on(Capability.MAPPED_RAM, *map(Capability, extra))
        ours.listen(f"file:{path}")
        assert ours.wait_end() is Status.COMPLETED, ours.error
        if stopped:
            assert ours.machine.read_memory(0, MEMORY_BYTES) == memory
            ours.machine.cont()
        read = ours.machine.read_memory
        check_goes_on(read, workload, left_at)
        ours.machine.stop()
        check_memory(read, workload)


DIRECT = (Capability.MAPPED_RAM, Capability.MULTIFD)


@pytest.mark.proves(Way.TO, Feature.DIRECT)
def test_qemu_loads_past_the_page_cache_what_we_saved_so(tmp_path):
    need_disk(tmp_path)
    workload = hammer()
    uri = f"file:{tmp_path}/saved,offset=0x1234"
    with ours_running(workload) as ours:
        ours.switch_on(*DIRECT)
        ours.migration.set_parameters({"direct-io": True})
        left_at = save(ours, uri)
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu:
        qemu.capabilities(*DIRECT)
        qemu.parameters(direct_io=True)
        qemu.listen(uri)
        check_at_qemu(qemu, workload, left_at)


@pytest.mark.proves(Way.FROM, Feature.DIRECT)
def test_we_load_past_the_page_cache_what_qemu_saved_so(tmp_path):
    need_disk(tmp_path)
    workload = hammer()
    path = tmp_path / "saved"
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu:
        send_to_qemu(workload, qemu)
        qemu.capabilities(*DIRECT)
        qemu.parameters(max_bandwidth=1 << 40, direct_io=True)
        qemu("stop")
        qemu("migrate", uri=f"file:{path}")
        qemu.wait_migration("completed")
        memory = qemu.read_memory(0, MEMORY_BYTES)
    with OurGuest.waiting(workload, "kvm") as ours:
        ours.switch_on(*DIRECT)
        ours.migration.set_parameters({"direct-io": True})
        ours.listen(f"file:{path}")
        assert ours.wait_end() is Status.COMPLETED, ours.error
        assert ours.machine.read_memory(0, MEMORY_BYTES) == memory


@TO
@pytest.mark.parametrize("capabilities", [(), DIRECT[:1], DIRECT[1:], DIRECT], ids=str)
def test_both_accept_direct_io_with_any_capabilities(tmp_path, capabilities):
    """QEMU looks at it when it opens the file for multifd, and refuses no order for it."""
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu,
        OurGuest.waiting(hammer(), "kvm") as ours,
    ):
        qemu.capabilities(*capabilities)
        ours.switch_on(*capabilities)
        qemu.parameters(direct_io=True)
        ours.migration.set_parameters({"direct-io": True})
        assert qemu("query-migrate-parameters")["direct-io"] is True


@TO
@FROM
def test_both_describe_their_files_alike(tmp_path):
    """The JSON at the end, as far as it tells of the configuration section."""
    workload = hammer()
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu,
        ours_running(workload) as ours,
    ):
        qemu.capabilities("mapped-ram")
        save(ours, f"file:{tmp_path}/ours")
        qemu.listen(f"file:{tmp_path}/ours")
        qemu.wait_migration("completed")
        qemu("migrate", uri=f"file:{tmp_path}/theirs")
        qemu.wait_migration("completed")
    described = []
    for name in ("ours", "theirs"):
        tail = (tmp_path / name).read_bytes()[-(1 << 20) :]
        described.append(json.loads(tail[tail.rindex(b'{"configuration"') :]))
    assert described[0]["configuration"] == described[1]["configuration"]


# --- what does not fit


@TO
@pytest.mark.parametrize("here", [True, False], ids=["saved with it", "saved without"])
def test_the_capability_at_one_end_only(tmp_path, here):
    workload = hammer()
    path = tmp_path / "saved"
    uri = f"file:{path}"
    with ours_running(workload) as ours:
        ours.machine.stop()
        if here:
            ours.switch_on(Capability.MAPPED_RAM)
        ours.migration.migrate(uri)
        assert ours.wait_end() is Status.COMPLETED, ours.error
    words = ("off", "on") if here else ("on", "off")
    says = "Capability mapped-ram is {}, but received capability is {}".format(*words)
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        if not here:
            qemu.capabilities("mapped-ram")
            ours.switch_on(Capability.MAPPED_RAM)
        qemu.listen(uri, exit_on_error=False)
        wait_until(lambda: says in qemu.log, 10, "QEMU does not complain")
        ours.listen(uri)
        assert ours.wait_end() is Status.FAILED
        assert says in ours.error


@TO
@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix:/tmp/nobody", "exec:cat"])
def test_the_same_words_where_nothing_has_a_place(tmp_path, uri):
    workload = hammer()
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        qemu.capabilities("mapped-ram")
        ours.switch_on(Capability.MAPPED_RAM)
        with pytest.raises(QmpRefused) as theirs:
            qemu.listen(uri)
        with pytest.raises(Refused) as ours_said:
            ours.listen(uri)
        assert str(ours_said.value) == str(theirs.value)


@FROM
def test_an_image_of_qemus_opens(tmp_path):
    workload = hammer()
    path = tmp_path / "saved"
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES) as qemu:
        send_to_qemu(workload, qemu)
        qemu.capabilities("mapped-ram")
        qemu("stop")
        qemu("migrate", uri=f"file:{path}")
        qemu.wait_migration("completed")
        memory = qemu.read_memory(0, MEMORY_BYTES)
    with open_image(path) as image:
        assert image.format == "mapped-ram"
        assert image.read("microvm.ram", 0, MEMORY_BYTES // 4096).tobytes() == memory
