"""KVM's objects: what they read back, what they refuse, and how a vCPU is stopped."""

import ctypes
import os

import pytest

from postcopy.abi.kvm import Exit, kvm_msrs
from postcopy.errors import HostCannot, KernelError
from postcopy.kernel.kvm import Kvm
from postcopy.kernel.mapping import Mapping

PAGE = 4096
SYSENTER_CS, NO_SUCH_MSR, STAR = 0x174, 0x12345678, 0xC0000081


@pytest.fixture
def kvm():
    try:
        opened = Kvm()
    except HostCannot as error:
        pytest.skip(f"needs KVM: {error}")
    with opened:
        yield opened


@pytest.fixture
def vcpu(kvm):
    vm = kvm.create_vm()
    made = vm.create_vcpu(0)
    made.set_cpuid(kvm.supported_cpuid())
    yield made
    made.close()
    vm.close()


def test_no_such_device(tmp_path):
    with pytest.raises(HostCannot, match="cannot be opened") as error:
        Kvm(str(tmp_path / "kvm"))
    assert "unicorn" in error.value.cure


def test_state_reads_back(vcpu):
    regs = vcpu.get_regs()
    regs.rax, regs.r15 = 0x1122334455667788, 5
    vcpu.set_regs(regs)
    again = vcpu.get_regs()
    assert (again.rax, again.r15) == (0x1122334455667788, 5)
    for name in ("sregs", "xsave", "xcrs", "debugregs", "mp_state", "vcpu_events"):
        state = getattr(vcpu, f"get_{name}")()
        getattr(vcpu, f"set_{name}")(state)
        if name != "vcpu_events":
            assert bytes(getattr(vcpu, f"get_{name}")()) == bytes(state)


def test_msrs_that_are_refused_are_named(vcpu):
    assert vcpu.set_msrs({STAR: 7, NO_SUCH_MSR: 1, SYSENTER_CS: 9}) == (NO_SUCH_MSR,)
    assert vcpu.get_msrs((STAR, NO_SUCH_MSR, SYSENTER_CS)) == {STAR: 7, SYSENTER_CS: 9}
    assert ctypes.sizeof(kvm_msrs) == 8


def test_an_exit_asked_for_before_the_entry_is_not_lost(vcpu):
    vcpu.ask_exit()
    assert vcpu.enter() is Exit.INTR
    assert vcpu.enter() is Exit.INTR


def test_the_dirty_log_is_off_until_asked_for(kvm):
    vm = kvm.create_vm()
    with Mapping.anonymous(64 * PAGE) as memory:
        vm.set_memory(0, 0, memory.length, memory.address, log_dirty=False)
        with pytest.raises(KernelError, match="KVM_GET_DIRTY_LOG failed"):
            vm.dirty_log(0, memory.length)
        vm.set_memory(0, 0, memory.length, memory.address, log_dirty=True)
        assert vm.dirty_log(0, memory.length).tolist() == [0] * 8
        vm.close()


def test_an_eventfd_belongs_to_one_address_and_value(kvm):
    vm = kvm.create_vm()
    fd = os.eventfd(0)
    vm.signal_at_write(0xFEB00E50, 0, fd)
    vm.signal_at_write(0xFEB00E50, 1, fd)
    with pytest.raises(KernelError, match="EEXIST"):
        vm.signal_at_write(0xFEB00E50, 1, fd)
    os.close(fd)
    vm.close()
