"""What a guest is told that the processor can do: nothing that cannot move."""

from machine.machines import need
from postcopy.abi.kvm import kvm_cpuid_entry2
from postcopy.kernel.kvm import Kvm
from postcopy.machine import cpuid

ALL = 0xFFFFFFFF


def leaf(function, index=0, vcpu=0):
    entry = kvm_cpuid_entry2(function, index, 1, ALL, ALL, ALL, ALL)
    (carried,) = cpuid.carried([entry], vcpu)
    assert entry.eax == ALL  # the original is left alone
    return carried


def test_wide_vectors_and_keys_are_hidden():
    seven = leaf(7)
    assert not seven.ebx & 1 << 16  # AVX-512 F
    assert not seven.ecx & (1 << 3 | 1 << 7)  # PKU, CET
    assert not seven.edx & (1 << 24 | 1 << 20)  # AMX, CET
    assert seven.ebx & 1 << 5  # AVX2
    assert leaf(7, 1).eax == 0


def test_xsave_is_x87_sse_avx():
    zero = leaf(0xD)
    assert (zero.eax, zero.edx, zero.ebx, zero.ecx) == (7, 0, 832, 832)
    assert leaf(0xD, 1).eax & 0b1111 == 0b0111
    assert leaf(0xD, 5).eax == 0


def test_each_vcpu_has_its_number():
    assert leaf(1, vcpu=3).ebx >> 24 == 3
    assert leaf(0xB, vcpu=3).edx == 3


def test_paravirtual_features_and_counters_are_hidden():
    assert leaf(0x40000001).eax == 0
    assert leaf(0xA).eax == 0


def test_the_hosts_leaves():
    need("kvm")
    with Kvm() as kvm:
        entries = cpuid.carried(kvm.supported_cpuid(), 1)
    xsave = [entry for entry in entries if (entry.function, entry.index) == (0xD, 0)]
    assert all(entry.eax & ~cpuid.XCR0_CARRIED == 0 for entry in xsave)
