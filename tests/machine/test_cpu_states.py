"""A vCPU's state goes from accelerator to accelerator, and through sections, unchanged."""

import threading
from dataclasses import replace

import pytest

from machine import guests
from machine.machines import need
from postcopy.errors import GuestError, StreamError
from postcopy.guest import DeviceState
from postcopy.kernel.kvm import Kvm
from postcopy.kernel.mapping import Mapping
from postcopy.machine.address_map import AddressMap
from postcopy.machine.cpu import ExitReason
from postcopy.machine.cpu_section import hflags
from postcopy.machine.cpu_state import CpuState, Events, Fpu, Segment, flat_long_mode
from postcopy.machine.kvm_cpu import KvmAccelerator
from postcopy.machine.kvm_state import read_kvm_state, with_lost_iopl, write_kvm_state
from postcopy.machine.ports import SerialState
from postcopy.machine.sections import Clock, decode_devices, encode_devices
from postcopy.machine.unicorn_cpu import UnicornAccelerator
from postcopy.machine.vcpu import install_kick_handler

MEMORY_BYTES = 4 << 20
ST = tuple(0x3FFF << 64 | 1 << 63 | number for number in range(8))

FULL = replace(
    guests.state().with_regs(rbx=(1 << 64) - 1, r15=15),
    rflags=0x3AD7,  # every arithmetic flag, DF, IOPL 3
    xmm=tuple((1 << 127) + number for number in range(16)),
    mxcsr=0x7F80,
    fpu=Fpu(0x27F, 0x3800, 0x81, ST, last_opcode=0x123, last_ip=77, last_dp=78),
    dr=(1, 2, 3, 4, 0xFFFF0FF0, 0x400, 0xFFFF0FF0, 0x400),
    star=5 << 32,
    cstar=0x2000,
    fmask=0x200,
    kernel_gs_base=7,
    sysenter_cs=8,
    sysenter_esp=9,
    sysenter_eip=10,
    cr2=0x1234,
    fs=Segment(0x13, 0x7000, 0xFFFFFFFF, 0x00C0F300),
    gs=Segment(0x13, 0x8000, 0xFFFFFFFF, 0x00C0F300),
    mtrr_deftype=0xC06,
    tsc_aux=3,
)


class Ports:
    def __init__(self):
        self.written = []

    def read(self, port, size_bytes):
        return port & 0xFF

    def write(self, port, size_bytes, value):
        self.written.append((port, size_bytes, value))


@pytest.fixture
def ram():
    with Mapping.anonymous(MEMORY_BYTES) as mapping:
        for address, data in guests.pages().items():
            mapping.write(address, data)
        yield mapping


ACCELERATORS = {"kvm": KvmAccelerator, "unicorn": UnicornAccelerator}


@pytest.fixture
def make_cpu(ram):
    made = []

    def make(name, ports=None):
        need(name)
        install_kick_handler()
        accelerator = ACCELERATORS[name](ram, AddressMap.flat(MEMORY_BYTES))
        cpu = accelerator.create_cpu(0, ports or Ports())
        made.extend((cpu, accelerator))
        return cpu

    yield make
    for each in made:
        each.close()


@pytest.fixture(params=["kvm", "unicorn"])
def cpu(request, make_cpu):
    return make_cpu(request.param)


def same(left: CpuState, right: CpuState) -> bool:
    """Equal but for the clock, which runs on, and what each host has of its own."""
    host = {"tsc": 0, "tsc_khz": 0, "apic_base": 0, "xstate_bv": 0}
    return replace(left, **host) == replace(right, **host)


def run_for_a_while(cpu, ram):
    """Let it count; then the state and the counter that go together."""
    before = counter(ram)
    exits = []
    cpu.unkick()
    thread = threading.Thread(target=lambda: exits.append(cpu.enter()))
    thread.start()
    while counter(ram) == before and thread.is_alive():
        pass
    cpu.kick()
    thread.join(10)
    assert [each.reason for each in exits] == [ExitReason.INTERRUPTED], exits
    return cpu.get_state()


def counter(ram):
    return int.from_bytes(ram.read(guests.COUNTER, 8), "little")


def test_a_state_is_read_as_it_was_written(cpu):
    cpu.set_state(FULL)
    assert same(cpu.get_state(), FULL)


def test_a_state_goes_through_sections_unchanged():
    machine = decode_devices(encode_devices([FULL, guests.state()]), 2)
    assert same(machine.cpus[0], FULL)
    assert same(machine.cpus[1], guests.state())


def test_kvm_to_section_to_kvm():
    need("kvm")
    with Kvm() as kvm:
        vm = kvm.create_vm()
        vcpus = [vm.create_vcpu(number) for number in range(2)]
        try:
            for vcpu in vcpus:
                vcpu.set_cpuid(kvm.supported_cpuid())
            assert write_kvm_state(vcpus[0], FULL) == ()
            first = read_kvm_state(vcpus[0])
            (arrived,) = decode_devices(encode_devices([first]), 1).cpus
            write_kvm_state(vcpus[1], arrived)
            assert same(read_kvm_state(vcpus[1]), first)
            assert same(first, FULL)
        finally:
            for vcpu in vcpus:
                vcpu.close()
            vm.close()


def test_a_state_survives_kvm_unicorn_kvm(make_cpu):
    state = FULL
    for name in ("kvm", "unicorn", "kvm"):
        cpu = make_cpu(name)
        cpu.set_state(state)
        state = cpu.get_state()
    assert same(state, FULL)


def go_round(make_cpu, ram, fpu):
    """The state after a guest that leaves the FPU alone has run on each accelerator twice."""
    state = replace(FULL, rflags=0x3002, tsc_aux=0, fpu=fpu)
    for name in ("kvm", "unicorn", "kvm", "unicorn"):
        cpu = make_cpu(name)
        cpu.set_state(state)
        state = run_for_a_while(cpu, ram)
        assert guests.counted(state) == counter(ram)
    assert state.xmm == FULL.xmm
    assert state.rflags & 0x3000 == 0x3000
    return state


def test_a_running_guest_goes_round_and_counts_exactly(make_cpu, ram):
    state = go_round(make_cpu, ram, FULL.fpu)
    # AMD's FXRSTOR and XRSTOR restore the pointers only while an exception is pending.
    forgotten = replace(FULL.fpu, last_opcode=0, last_ip=0, last_dp=0)
    assert state.fpu in (FULL.fpu, forgotten)


def test_the_last_instruction_goes_round_while_its_exception_is_pending(make_cpu, ram):
    # The invalid operation is unmasked (bit 0 of the control word), and has happened (ES, IE).
    pending = replace(FULL.fpu, control=0x27E, status=0xB881)
    assert go_round(make_cpu, ram, pending).fpu == pending


@pytest.mark.parametrize("privilege", [3, 0])
def test_stops_are_exact(cpu, ram, privilege):
    cpu.set_state(guests.state(privilege))
    for _ in range(20):
        state = run_for_a_while(cpu, ram)
        assert guests.counted(state) == counter(ram)


def test_a_kick_before_the_entry_is_not_lost(cpu):
    cpu.set_state(guests.state())
    cpu.kick()
    assert cpu.enter().reason is ExitReason.INTERRUPTED
    assert cpu.get_state().rip == guests.CODE


def run_code(cpu, ram, code, privilege):
    ram.write(guests.CODE, bytes.fromhex(code))
    cpu.set_state(guests.state(privilege))
    exit_ = cpu.enter()
    while exit_.reason is ExitReason.SERVED:
        exit_ = cpu.enter()
    return exit_, cpu.get_state()


def test_ports_are_reached_from_user_code(make_cpu, ram):
    ports = Ports()
    # mov al,0x41; out 0xf4,al; in al,0x60; mov dx,0x3f8; out dx,al; hlt
    exit_, state = run_code(
        make_cpu("unicorn", ports), ram, "b041 e6f4 e460 66baf803 ee f4", privilege=3
    )
    assert ports.written == [(0xF4, 1, 0x41), (0x3F8, 1, 0x60)]
    # HLT is not for user code, and there is no handler.
    assert exit_.reason is ExitReason.SHUTDOWN
    assert "exception 13 at RIP 0x1000b" in exit_.detail
    assert state.rip == guests.CODE + 0xB


def test_halt_is_seen(cpu, ram):
    exit_, state = run_code(cpu, ram, "90 f4", privilege=0)
    assert exit_.reason is ExitReason.HALTED
    assert state.rip == guests.CODE + 2


def test_user_code_cannot_touch_the_kernels_pages(make_cpu, ram):
    entries = (0xE7).to_bytes(8, "little") + (0x2000E3).to_bytes(8, "little")
    ram.write(guests.TABLES + 2 * guests.PAGE, entries)
    # mov rax,[0x200000]
    exit_, _ = run_code(make_cpu("unicorn"), ram, "488b042500002000", privilege=3)
    assert exit_.reason is ExitReason.SHUTDOWN
    assert "touching address 0x200000" in exit_.detail


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"efer": 0}, "64-bit code only"),
        ({"ymm_high": (1,) * 16}, "AVX"),
        ({"events": Events(interrupt=32)}, "needs KVM"),
    ],
)
def test_software_says_what_it_cannot_go_on_from(make_cpu, change, why):
    with pytest.raises(GuestError, match=why):
        make_cpu("unicorn").set_state(replace(guests.state(), **change))


def test_kvm_says_which_value_it_refuses(make_cpu):
    with pytest.raises(GuestError, match="0x7 in MSR 0x12345678"):
        make_cpu("kvm").set_state(replace(guests.state(), msrs={0x12345678: 7}))
    make_cpu("kvm").set_state(replace(guests.state(), msrs={0x12345678: 0}))


def test_hflags_are_those_that_tcg_wants():
    kernel = replace(flat_long_mode(rip=0, rsp=0, cr3=0, privilege=0), cr0=0x80000011, cr4=0x20)
    assert hflags(replace(kernel, rflags=2, efer=0x500)) == 0xC0B0
    assert hflags(CpuState()) == 0x40
    assert hflags(guests.state()) == 0x40F2B3


def test_lost_io_privilege_is_given_back_only_to_pure_user_code():
    loaded = guests.state()
    lost = replace(loaded, rflags=2)
    assert with_lost_iopl(lost, loaded).rflags == 0x3002
    assert with_lost_iopl(lost, replace(loaded, lstar=1)).rflags == 2
    assert with_lost_iopl(lost, None).rflags == 2


def test_the_serial_port_is_named_only_when_it_is_not_at_rest():
    def names(serial):
        return [each.name for each in encode_devices([FULL], serial)]

    at_rest = ["timer", "cpu_common", "cpu", "globalstate"]
    assert names(None) == names(SerialState()) == at_rest
    used = SerialState(lcr=3, fcr=1)
    assert names(used) == [*at_rest[:-1], "serial", at_rest[-1]]
    assert decode_devices(encode_devices([FULL], used)).serial == used


def test_the_clock_and_the_run_state_move():
    states = encode_devices([FULL], run_state="paused", clock=Clock((1 << 64) - 5, 7))
    machine = decode_devices(states)
    assert machine.run_state == "paused"
    assert machine.clock == Clock((1 << 64) - 5, 7)
    # A software QEMU has no TSC but the machine's clock.
    assert machine.cpus[0].tsc == (1 << 64) - 5


def test_another_number_of_vcpus_is_refused():
    two = encode_devices([FULL, FULL])
    with pytest.raises(
        GuestError, match=r"the stream has 2 vCPUs, this machine 1; start it with --smp 2"
    ):
        decode_devices(two, 1)
    with pytest.raises(StreamError, match=r"vCPUs \[1\]"):
        decode_devices([each for each in two if each.instance or each.name == "timer"])


def test_an_unknown_run_state_is_refused():
    with pytest.raises(StreamError, match="invalid parameter value: jogging"):
        decode_devices(encode_devices([FULL], run_state="jogging"))


def test_a_device_that_we_have_not_is_refused():
    with pytest.raises(StreamError, match="Unknown savevm section or instance 'rtc' 0"):
        decode_devices([DeviceState("rtc", 0, 1, b"")])
