"""The machine's state as the sections of a stream, and back.

The order is QEMU's: the clock, then each vCPU's two sections, other devices, the run state.  The
serial port is named only when its registers are not at their reset values, since a machine without
such a port (``-M none``, ``microvm`` with ``isa-serial=off``) refuses the section.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from postcopy.errors import GuestError, StreamError
from postcopy.guest import DeviceState
from postcopy.machine import virtio_section
from postcopy.machine.cpu_formats import CPU, CPU_COMMON
from postcopy.machine.cpu_section import cpu_common_values, cpu_values, state_from_values
from postcopy.machine.cpu_state import CpuState
from postcopy.machine.device_formats import FORMATS, GLOBALSTATE, SERIAL, TIMER
from postcopy.machine.ports import SerialState
from postcopy.machine.virtio_state import VirtioState
from postcopy.stream.format_table import SectionFormat
from postcopy.stream.vmstate import Values

RUN_STATES: Final = frozenset(
    "debug inmigrate internal-error io-error paused postmigrate prelaunch finish-migrate "  # noqa: SIM905
    "restore-vm running save-vm shutdown suspended watchdog guest-panicked colo".split()
)
"""QEMU's ``RunState``; any other name in ``globalstate`` is refused."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The machine's own time where it stopped: TSC ticks, and nanoseconds since its start."""

    ticks: int = 0
    nanoseconds: int = 0


@dataclass(frozen=True, slots=True)
class MachineState:
    """All that a machine is besides its memory.

    ``run_state`` is what the guest was doing before it was stopped to be moved: ``running`` means
    go on, anything else means stay stopped.
    """

    cpus: tuple[CpuState, ...]
    serial: SerialState = field(default_factory=SerialState)
    run_state: str = "running"
    clock: Clock = field(default_factory=Clock)
    drive: VirtioState | None = None


def encode_devices(
    cpus: Sequence[CpuState],
    serial: SerialState | None = None,
    run_state: str = "running",
    clock: Clock | None = None,
    drive: VirtioState | None = None,
) -> list[DeviceState]:
    """The sections of a stopped machine, in the order of sending.

    :param serial: ``None`` when the machine has no port.
    :param drive: ``None`` when the machine has none.
    :param clock: without one, the first vCPU's TSC counts: a QEMU with a software CPU goes on
        counting from there.
    """
    now = clock or Clock(ticks=cpus[0].tsc if cpus else 0)
    states = [_section(TIMER, 0, _timer_values(now))]
    for number, cpu in enumerate(cpus):
        states.append(_section(CPU_COMMON, number, cpu_common_values(cpu)))
        states.append(_section(CPU, number, cpu_values(cpu)))
    if serial is not None and serial != SerialState():
        states.append(_section(SERIAL, 0, _serial_values(serial)))
    if drive is not None:
        values = virtio_section.values_of(drive)
        states.append(_section(virtio_section.FORMATS[drive.section], 0, values))
    states.append(_section(GLOBALSTATE, 0, _globalstate_values(run_state)))
    return states


def decode_devices(states: Sequence[DeviceState], vcpus: int | None = None) -> MachineState:
    """What the sections of a stream say; those of devices we do without are dropped.

    :param vcpus: how many vCPUs this machine has; ``None`` takes any number.
    :raises StreamError: a section is unknown, or not as long as it should be.
    :raises GuestError: the machine cannot be what the stream describes.
    """
    values = {
        (each.name, each.instance): FORMATS.decode(
            each.name, each.instance, each.version, each.payload
        )
        for each in states
    }
    clock = _clock(values)
    return MachineState(
        cpus=tuple(_with_ticks(cpu, clock) for cpu in _cpus(values, vcpus)),
        serial=_serial(values),
        run_state=_run_state(values),
        clock=clock,
        drive=_drive(values),
    )


def descriptions(states: Sequence[DeviceState]) -> list[dict[str, Any]]:
    """What the JSON at the end of a stream says of these sections, under ``devices``."""
    described = []
    for each in states:
        format_ = FORMATS.find(each.name, each.instance, each.version)
        values = FORMATS.decode(each.name, each.instance, each.version, each.payload)
        head = {"name": each.name, "instance_id": each.instance}
        described.append(head | format_.describe(values))
    return described


_Sections = dict[tuple[str, int], dict[str, Any]]


def _section(format_: SectionFormat, instance: int, values: Values) -> DeviceState:
    return DeviceState(format_.name, instance, format_.version, format_.encode(values))


def _cpus(values: _Sections, vcpus: int | None) -> list[CpuState]:
    numbers = sorted(instance for name, instance in values if name == "cpu")
    if numbers != list(range(len(numbers))):
        raise StreamError(f"the stream has vCPUs {numbers}, which is not one after another")
    if vcpus is not None and len(numbers) != vcpus:
        raise GuestError(
            f"the stream has {len(numbers)} vCPUs, this machine {vcpus}; "
            f"start it with --smp {len(numbers)}"
        )
    no_common = {"halted": 0, "interrupt_request": 0}
    return [
        state_from_values(values["cpu", number], values.get(("cpu_common", number), no_common))
        for number in numbers
    ]


def _with_ticks(cpu: CpuState, clock: Clock) -> CpuState:
    # QEMU's software CPU keeps no TSC of its own: there it is the machine's clock.
    return cpu if cpu.tsc else replace(cpu, tsc=clock.ticks)


def _timer_values(clock: Clock) -> dict[str, int]:
    # Both fields are signed on the wire, the TSC is not.
    ticks = clock.ticks - (1 << 64) if clock.ticks >> 63 else clock.ticks
    return {"cpu_ticks_offset": ticks, "cpu_clock_offset": clock.nanoseconds}


def _clock(values: _Sections) -> Clock:
    timer = values.get(("timer", 0))
    if timer is None:
        return Clock()
    return Clock(timer["cpu_ticks_offset"] % (1 << 64), timer["cpu_clock_offset"])


def _serial_values(serial: SerialState) -> dict[str, dict[str, int]]:
    registers = asdict(serial)
    registers["fcr_vmstate"] = registers.pop("fcr")
    return {"state": registers}


def _serial(values: _Sections) -> SerialState:
    section = values.get(("serial", 0))
    if section is None:
        return SerialState()
    registers = dict(section["state"])
    registers["fcr"] = registers.pop("fcr_vmstate")
    return SerialState(**registers)


def _drive(values: _Sections) -> VirtioState | None:
    for device, format_ in virtio_section.FORMATS.items():
        section = values.get((format_.name, 0))
        if section is not None:
            return virtio_section.state_of(section, device)
    return None


def _globalstate_values(run_state: str) -> dict[str, Any]:
    return {
        "size": len(run_state) + 1,
        "runstate": run_state.encode(),
        "has_vm_was_suspended": 1,
        "vm_was_suspended": int(run_state == "suspended"),
        "unused": b"",
    }


def _run_state(values: _Sections) -> str:
    section = values.get(("globalstate", 0))
    if section is None:
        return "running"
    name = bytes(section["runstate"]).split(b"\0")[0].decode("ascii", "backslashreplace")
    if name not in RUN_STATES:
        raise StreamError(f"invalid parameter value: {name}")
    return name
