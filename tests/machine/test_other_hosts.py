"""A vCPU on hosts whose processor can do less than this one, or counts at another rate."""

import errno
import logging
from dataclasses import replace

import pytest

from machine import guests
from machine.machines import need
from postcopy.abi import kvm as abi
from postcopy.errors import KernelError
from postcopy.kernel import calls
from postcopy.kernel.kvm import Kvm
from postcopy.kernel.mapping import Mapping
from postcopy.machine.address_map import AddressMap
from postcopy.machine.cpu import ExitReason
from postcopy.machine.kvm_cpu import KvmAccelerator
from postcopy.machine.vcpu import install_kick_handler

MEMORY_BYTES = 4 << 20
HALT = bytes.fromhex("f4")
RATE_KHZ = 1_234_567


class NoPorts:
    def read(self, port, size_bytes):
        return 0xFF

    def write(self, port, size_bytes, value):
        raise AssertionError("the guest writes to no port")


class Kernel:
    """A KVM that refuses ``requests``, and keeps the ``rates`` that it was asked for."""

    def __init__(self):
        self.requests = frozenset()
        self.rates = []
        self._ioctl, self._ioctl_plain = calls.ioctl, calls.ioctl_plain

    def ioctl_plain(self, fd, request, value=0, **options):
        self._refuse(request)
        if request is abi.KVM_SET_TSC_KHZ:
            self.rates.append(value)
            return 0
        return self._ioctl_plain(fd, request, value, **options)

    def ioctl(self, fd, request, argument, **options):
        self._refuse(request)
        done = self._ioctl(fd, request, argument, **options)
        if request is abi.KVM_GET_XCRS and abi.KVM_SET_XCRS in self.requests:
            argument.nr_xcrs = 0
        return done

    def _refuse(self, request):
        if request in self.requests:
            raise KernelError(request.name, errno.EINVAL)


@pytest.fixture
def kernel(monkeypatch):
    need("kvm")
    kernel = Kernel()
    monkeypatch.setattr(calls, "ioctl_plain", kernel.ioctl_plain)
    monkeypatch.setattr(calls, "ioctl", kernel.ioctl)
    return kernel


@pytest.fixture
def cpu(kernel):
    install_kick_handler()
    with Mapping.anonymous(MEMORY_BYTES) as ram:
        for address, data in (guests.pages() | {guests.CODE: HALT}).items():
            ram.write(address, data)
        accelerator = KvmAccelerator(ram, AddressMap.flat(MEMORY_BYTES))
        cpu = accelerator.create_cpu(0, NoPorts())
        yield cpu
        cpu.close()
        accelerator.close()


def runs(cpu, state):
    cpu.set_state(state)
    cpu.unkick()
    return cpu.enter().reason is ExitReason.HALTED


def test_a_guest_counts_on_at_the_rate_it_had(kernel, cpu, caplog):
    assert runs(cpu, replace(guests.state(0), tsc_khz=RATE_KHZ))
    assert kernel.rates == [RATE_KHZ]
    assert not caplog.records


def test_where_the_counter_cannot_be_scaled_the_guest_runs_and_that_is_said(kernel, cpu, caplog):
    kernel.requests = frozenset({abi.KVM_SET_TSC_KHZ})
    with caplog.at_level(logging.WARNING):
        assert runs(cpu, replace(guests.state(0), tsc_khz=RATE_KHZ))
    assert f"ran at {RATE_KHZ} kHz" in caplog.text


def test_a_rate_that_is_the_hosts_or_unknown_is_not_asked_for(kernel, cpu):
    for rate in (cpu.get_state().tsc_khz, 0):
        assert runs(cpu, replace(guests.state(0), tsc_khz=rate))
    assert kernel.rates == []


def test_a_host_that_knows_no_rate(kernel, cpu):
    kernel.requests = frozenset({abi.KVM_GET_TSC_KHZ, abi.KVM_SET_TSC_KHZ})
    assert runs(cpu, guests.state(0))
    assert cpu.get_state().tsc_khz == 0


def test_a_processor_without_xsave(kernel, cpu):
    kernel.requests = frozenset({abi.KVM_SET_XCRS})
    assert runs(cpu, guests.state(0))
    assert cpu.get_state().xcr0 == 1


def test_the_kernel_itself_takes_a_rate():
    """Each KVM takes a faster one: a processor that cannot scale is made to catch up."""
    need("kvm")
    with Kvm() as kvm:
        vm = kvm.create_vm()
        vcpu = vm.create_vcpu(0)
        try:
            rate_khz = vcpu.tsc_khz
            if not rate_khz:
                pytest.skip("needs a time stamp counter of known rate: this host's is unstable")
            vcpu.set_tsc_khz(rate_khz * 2)
            assert vcpu.tsc_khz == rate_khz * 2
        finally:
            vcpu.close()
            vm.close()
