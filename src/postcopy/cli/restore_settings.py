"""The options of ``postcopy restore``: what the image says of its machine, and what the user wants."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from postcopy.cli.run_settings import NONE, RestoreOrder, RunSettings, monitors_of
from postcopy.errors import ImageError, Refused
from postcopy.guest import DeviceState
from postcopy.machine.config import RAM_NAMES, MachineConfig, MachineType
from postcopy.snapshot.image import open_image

_START_TIME_FIELD: Final = 21  # of /proc/PID/stat, in clock ticks since the host has started


def restore_settings(options: Mapping[str, Any]) -> RunSettings:
    """The settings that the options and the image mean.

    :raises Refused: they do not go together, or the image is none that a machine of ours can run.
    """
    path = Path(options["path"])
    if options["record"] and not options["lazy"]:
        raise Refused(
            "--record-working-set notes what is touched before it is there; give --lazy too"
        )
    return RunSettings(
        machine=_machine(path, options),
        incoming=None,
        paused=options["paused"],
        monitors=monitors_of(options),
        qmps=tuple(place for place in options["qmps"] if place != NONE),
        name=options["name"],
        serial=options["serial"],
        restore=RestoreOrder(
            path=str(path),
            lazy=options["lazy"],
            prefetch=options["prefetch"],
            record=options["record"],
            began_ns=process_start_ns(),
        ),
    )


def process_start_ns() -> int:
    """When this process has started, on the monotonic clock; to a hundredth of a second."""
    text = Path("/proc/self/stat").read_text()
    ticks = int(text.rpartition(")")[2].split()[_START_TIME_FIELD - 2])
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - max(0, age_ns)


def _machine(path: Path, options: Mapping[str, Any]) -> MachineConfig:
    try:
        with open_image(path) as image:
            machine = _machine_type(path, image.machine_name)
            config = MachineConfig(
                memory_bytes=_memory_bytes(path, machine, image.blocks),
                vcpus=_vcpus(path, image.devices),
                accel=options["accel"],
                huge_pages=options["huge_pages"],
                machine_type=machine,
            )
    except ImageError as error:
        raise Refused(str(error)) from error
    config.check()
    return config


def _machine_type(path: Path, name: str) -> MachineType:
    for known in get_args(MachineType):
        if known == name:
            machine: MachineType = known
            return machine
    raise Refused(
        f"{path}: it is of a machine '{name}'; ours are {', '.join(get_args(MachineType))}"
    )


def _memory_bytes(path: Path, machine: MachineType, blocks: Sequence[Any]) -> int:
    name = RAM_NAMES[machine]
    for block in blocks:
        if block.name == name:
            return int(block.size_bytes)
    raise Refused(f"{path}: it has no RAM block '{name}'")


def _vcpus(path: Path, devices: Sequence[DeviceState]) -> int:
    count = sum(1 for device in devices if device.name == "cpu")
    if not count:
        raise Refused(f"{path}: it has no vCPU")
    return count
