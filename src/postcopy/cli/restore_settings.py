"""The options of ``postcopy restore``: what the image says of its machine, and what the user wants."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

from postcopy.cli.ahead import import_ahead
from postcopy.cli.run_settings import NONE, RestoreOrder, RunSettings, monitors_of
from postcopy.errors import ImageError, Refused
from postcopy.link.guest.engine_process import EnginePool
from postcopy.link.protocol import RestoreCommands
from postcopy.machine.config import RAM_NAMES, MachineConfig, MachineType

_START_TIME_FIELD: Final = 21  # of /proc/PID/stat, in clock ticks since the host has started


def restore_settings(options: Mapping[str, Any], engines: EnginePool) -> RunSettings:
    """The settings that the options and the image mean.

    :param engines: the next of these opens the image, and restores it.
    :raises Refused: they do not go together, or the image is none that a machine of ours can run.
    """
    path = Path(options["path"]).absolute()  # as the engine is told later, too
    if options["record"] and not options["lazy"]:
        raise Refused(
            "--record-working-set notes what is touched before it is there; give --lazy too"
        )
    return RunSettings(
        machine=_machine(path, options, engines),
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


def _machine(path: Path, options: Mapping[str, Any], engines: EnginePool) -> MachineConfig:
    """The machine of an image.  The engine reads it, and goes on with what it has opened."""
    answer = engines.ask(RestoreCommands.look_at_image, str(path))
    import_ahead(lambda: answer.has_come)
    try:
        image = answer.wait()
    except ImageError as error:
        raise Refused(str(error)) from error
    machine = _machine_type(path, image.machine)
    config = MachineConfig(
        memory_bytes=_memory_bytes(path, machine, image.blocks),
        vcpus=_vcpus(path, image.vcpus),
        accel=options["accel"],
        huge_pages=options["huge_pages"],
        transparent_huge_pages=not options["lazy"],
        machine_type=machine,
    )
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


def _memory_bytes(path: Path, machine: MachineType, blocks: Mapping[str, int]) -> int:
    name = RAM_NAMES[machine]
    if name not in blocks:
        raise Refused(f"{path}: it has no RAM block '{name}'")
    return blocks[name]


def _vcpus(path: Path, count: int) -> int:
    if not count:
        raise Refused(f"{path}: it has no vCPU")
    return count
