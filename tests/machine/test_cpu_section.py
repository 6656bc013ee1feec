"""Our sections and a real QEMU's: read, written again byte for byte, and loaded by the other."""

import itertools
import json

import pytest

from fakes.qemu_machine import MACHINES, QemuMachine, description_of, devices_of, precopy_stream
from fakes.qemu_versions import ALL, NEWEST, USUAL
from fakes.waiting import wait_until
from machine import guests
from postcopy.guest import DeviceState
from postcopy.machine.cpu_formats import CPU, SUBSECTIONS
from postcopy.machine.cpu_section import (
    cpu_common_values,
    cpu_values,
    hflags,
    state_from_values,
)
from postcopy.machine.device_formats import FORMATS, SERIAL
from postcopy.machine.ports import SerialState
from postcopy.machine.sections import decode_devices, descriptions, encode_devices
from postcopy.stream.vmstate import Structure

pytestmark = pytest.mark.qemu(*ALL)


@pytest.fixture(params=["tcg", "kvm"])
def accelerator(request):
    return request.param


def layout(device):
    """Names and sizes of a described device's fields, whatever a structure is called."""

    def fields(entries):
        for entry in entries:
            yield entry["size"], entry.get("array_len", 1)

    subsections = [
        (each["vmsd_name"], each["version"], list(fields(each["fields"])))
        for each in device.get("subsections", ())
    ]
    head = (device["name"], device["instance_id"], device["version"])
    sizes = list(fields(device["fields"]))
    if device["name"] == "globalstate":  # QEMU 7.2 has fewer fields for the same bytes
        sizes = [(sum(size * count for size, count in sizes), 1)]
    return *head, sizes, subsections


@pytest.mark.parametrize("machine", ["microvm", "microvm-serial"])
def test_what_qemu_sends_is_read_and_written_again(machine, accelerator, tmp_path):
    with QemuMachine(machine, accelerator, tmp_path, "-smp", "2") as qemu:
        stream = qemu.migrate_to(tmp_path / "stream")
    states = devices_of(stream, FORMATS)
    values = {}
    for each in states:
        key = each.name, each.instance
        values[key] = FORMATS.decode(each.name, each.instance, each.version, each.payload)
        assert FORMATS.encode(each.name, values[key]) == each.payload, each.name
    for each in states:
        if each.name == "cpu":
            common = values["cpu_common", each.instance]
            state = state_from_values(values["cpu", each.instance], common)
            assert CPU.encode(cpu_values(state)) == each.payload
            assert cpu_common_values(state) == common
    assert len(decode_devices(states, 2).cpus) == 2
    described = json.loads(description_of(stream))["devices"]
    assert [layout(each) for each in descriptions(states)] == [layout(each) for each in described]
    names = [each.name for each in states]
    assert "timer" in names
    assert names[-1] == "globalstate"


@pytest.mark.parametrize("privilege", [3, 0])
@pytest.mark.parametrize("machine", ["none", "microvm"])
def test_a_guest_of_ours_goes_on_counting_in_qemu(machine, privilege, accelerator, tmp_path):
    devices = encode_devices([guests.state(privilege)])
    block = MACHINES[machine][1]
    path = tmp_path / "stream"
    path.write_bytes(precopy_stream(machine, block, guests.pages(), devices))
    with QemuMachine(machine, accelerator, tmp_path, "-incoming", "defer") as qemu:
        qemu.load(path)
        qemu.wait_running()
        wait_until(lambda: qemu.word(guests.COUNTER) > guests.START, what="the guest counts")
        seen = qemu.word(guests.COUNTER)
        wait_until(lambda: qemu.word(guests.COUNTER) > seen, what="it goes on")


def test_a_guest_comes_back_from_qemu_and_has_counted_right(accelerator, tmp_path):
    devices = encode_devices([guests.state()])
    path = tmp_path / "stream"
    path.write_bytes(precopy_stream("microvm", "microvm.ram", guests.pages(), devices))
    with QemuMachine("microvm", accelerator, tmp_path, "-incoming", "defer") as qemu:
        qemu.load(path)
        qemu.wait_running()
        wait_until(lambda: qemu.word(guests.COUNTER) > guests.START)
        qemu("stop")
        count = qemu.word(guests.COUNTER)
        stream = qemu.migrate_to(tmp_path / "back")
    back = decode_devices(devices_of(stream, FORMATS), 1)
    assert guests.counted(back.cpus[0]) == count
    assert back.run_state == "paused"
    # Some nested KVMs (PVM) forget IOPL, whoever asks.
    iopl = 3 << 12
    assert hflags(back.cpus[0]) & ~iopl == hflags(guests.state()) & ~iopl


NOT_SENT_ON = {
    # QEMU keeps these at home unless the processor has the feature (the first: unless KVM has it).
    *(
        "cpu/exception_info",
        "cpu/mcg_ext_ctl",
        "cpu/amd_tsc_scale_msr",
        "cpu/msr_tsx_ctrl",
        "cpu/svn_npt",
    ),
    "cpu/msr_xfd",
}


def numbered(fields, numbers):
    """A value of its own for each number."""
    values = {}
    for field in fields:
        if isinstance(field.kind, Structure):
            elements = tuple(numbered(field.kind.fields, numbers) for _ in range(field.count))
        else:
            elements = tuple(itertools.islice(numbers, field.count))
        values[field.name] = elements[0] if field.count == 1 else elements
    return values


def through_qemu(machine, devices, folder):
    """What a QEMU that never runs the guest sends on."""
    path = folder / "stream"
    path.write_bytes(precopy_stream("microvm", "microvm.ram", guests.pages(), devices))
    with QemuMachine(machine, "tcg", folder, "-S", "-incoming", "defer") as qemu:
        qemu.load(path)
        wait_until(lambda: qemu("query-status")["status"] == "paused")
        return devices_of(qemu.migrate_to(folder / "back"), FORMATS)


@pytest.mark.qemu(USUAL, NEWEST)  # there were fewer of them
def test_optional_subsections_are_qemus(tmp_path):
    numbers = itertools.cycle(range(1, 251))
    optional = {each.name: numbered(each.fields, numbers) for each in SUBSECTIONS}
    cpu = DeviceState("cpu", 0, 12, CPU.encode(cpu_values(guests.state()) | optional))
    devices = [cpu if each.name == "cpu" else each for each in encode_devices([guests.state()])]
    sent = through_qemu("microvm", devices, tmp_path)
    cpu = next(each for each in sent if each.name == "cpu")
    back = FORMATS.decode("cpu", 0, cpu.version, cpu.payload)
    assert CPU.encode(back) == cpu.payload
    kept = {name: value for name, value in back.items() if name.startswith("cpu/")}
    assert kept == {name: v for name, v in optional.items() if name not in NOT_SENT_ON}


def test_a_serial_port_moves_to_qemu_and_back(tmp_path):
    port = SerialState(divider=1, lcr=3, mcr=3, scr=7)
    sent = through_qemu("microvm-serial", encode_devices([guests.state()], port), tmp_path)
    assert decode_devices(sent, 1).serial == port


def test_the_subsections_of_a_serial_port_are_qemus(tmp_path):
    fifo = {"data": bytes(range(1, 17)), "head": 1, "num": 2}
    optional = {
        "serial/thr_ipending": {"thr_ipending": 1},
        "serial/tsr": {"tsr_retry": 1, "thr": 2, "tsr": 3},
        "serial/recv_fifo": {"recv_fifo": fifo},
        "serial/xmit_fifo": {"xmit_fifo": fifo},
    }
    devices = encode_devices([guests.state()], SerialState(ier=2, lsr=0, fcr=1, iir=0xC1))
    at = next(number for number, each in enumerate(devices) if each.name == "serial")
    values = FORMATS.decode("serial", 0, 3, devices[at].payload) | optional
    devices[at] = DeviceState("serial", 0, 3, SERIAL.encode(values))
    sent = through_qemu("microvm-serial", devices, tmp_path)
    serial = next(each for each in sent if each.name == "serial")
    back = FORMATS.decode("serial", 0, 3, serial.payload)
    assert {name: back.get(name) for name in optional} == optional
