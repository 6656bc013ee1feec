"""A machine whose vCPUs get no threads is not made, and leaves nothing behind."""

from pathlib import Path

import pytest

from machine.machines import MIB, need
from postcopy.errors import HostCannot
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_it_is_refused_by_name(no_threads):
    need("kvm")
    before = descriptors()
    no_threads.refuse("vcpu-1")
    with pytest.raises(HostCannot, match="'vcpu-1' cannot be started; raise the limit of threads"):
        Machine(MachineConfig(2 * MIB, vcpus=2, accel="kvm"))
    assert descriptors() == before
