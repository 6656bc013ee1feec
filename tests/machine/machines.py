"""Machines for tests: small ones, with what they say and tell kept beside them."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import pytest

from fakes.waiting import wait_until
from postcopy.machine import workload_records
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.workload import Workload

MIB = 1 << 20


def need(accelerator: str) -> None:
    """Skip the test where there is no such accelerator."""
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm: run as root or join group kvm")
    if accelerator == "unicorn" and importlib.util.find_spec("unicorn") is None:
        pytest.skip("needs unicorn: pip install 'postcopy[unicorn]'")


class Watched:
    """A machine, the names of its events, and all it wrote to its serial port."""

    def __init__(self, config: MachineConfig) -> None:
        self.events: list[str] = []
        self.serial = bytearray()
        self.machine = Machine(config, on_event=self._event, on_serial=self.serial.extend)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    def _event(self, name: str, _data: Mapping[str, Any]) -> None:
        self.events.append(name)


def config_for(workload: Workload, accelerator: str, **more: Any) -> MachineConfig:
    return MachineConfig(
        workload.memory_bytes,
        vcpus=workload.vcpus,
        accel=accelerator,
        image=workload.image(),
        **more,
    )


def wait_for_work(machine: Machine, workload: Workload) -> None:
    """Until every vCPU has filled its slice."""

    def working() -> bool:
        assert machine.failure is None, machine.failure
        return workload_records.is_running(machine.read_memory, workload)

    wait_until(working, 30, "the workload has not filled its memory")


def wait_for_progress(machine: Machine, workload: Workload) -> None:
    """Until every vCPU has done something that it had not done at the call."""
    before = iterations(machine, workload)

    def gone_on() -> bool:
        assert machine.failure is None, machine.failure
        return all(a > b for a, b in zip(iterations(machine, workload), before, strict=True))

    wait_until(gone_on, 20, "a vCPU stands still")


def wait_for_writes(machine: Machine, workload: Workload) -> None:
    """Until a vCPU has written to its slice, which the oracle wants of all but an idle guest."""

    def written() -> bool:
        assert machine.failure is None, machine.failure
        found = (
            workload_records.read_record(machine.read_memory, n) for n in range(workload.vcpus)
        )
        return workload.name == "idle" or any(record and record.writes for record in found)

    wait_until(written, 20, "the guest writes nothing")


def iterations(machine: Machine, workload: Workload) -> list[int]:
    found = (workload_records.read_record(machine.read_memory, n) for n in range(workload.vcpus))
    return [0 if record is None else record.iterations for record in found]
