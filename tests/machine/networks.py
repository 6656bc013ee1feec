"""Networks for tests: the workload that uses one, and the check of every frame in memory."""

from typing import Any

from postcopy.machine import net_oracle
from postcopy.machine.workload import Workload, load
from postcopy.machine.workload_records import Read

MEMORY_BYTES = 32 << 20


def net_workload(
    accelerator: str = "kvm", vcpus: int = 1, *, memory_bytes: int = MEMORY_BYTES, **more: Any
) -> Workload:
    """Sends frames, and awaits each."""
    fill = 4 << 20 if accelerator == "kvm" else 512 << 10
    return load("net", memory_bytes, vcpus, **({"fill_bytes": fill} | more))


def frames(read: Read, workload: Workload) -> int:
    """How many have come back."""
    return net_oracle.read_net_record(read, workload).frames


def check_net(read: Read, workload: Workload) -> net_oracle.NetVerification:
    """Of a guest that stands still: every buffer."""
    found = net_oracle.verify_net(read, workload)
    assert found.ok, found
    assert found.frames
    return found
