"""The options of ``postcopy run``, checked against each other."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from postcopy.errors import Refused
from postcopy.machine import workload
from postcopy.machine.config import MachineConfig, read_image

DEFER = "defer"
STDIO = "stdio"
NONE = "none"


@dataclass(frozen=True)
class RestoreOrder:
    """What ``x-restore`` is asked for.

    :param began_ns: when the process has started, on the monotonic clock.
    """

    path: str
    lazy: bool
    prefetch: str
    record: bool
    began_ns: int


@dataclass(frozen=True)
class RunSettings:
    """One guest's process.

    :param incoming: a URI to listen at, ``defer``, or None for a guest that boots.
    :param monitors: addresses of HMP monitors; ``stdio`` at most once.
    :param qmps: addresses of QMP monitors.
    :param serial: ``stdio``, ``none`` or ``file:PATH``.
    :param restore: the image that the guest wakes from, in place of ``incoming``.
    """

    machine: MachineConfig
    incoming: str | None
    paused: bool
    monitors: tuple[str, ...]
    qmps: tuple[str, ...]
    name: str | None
    serial: str
    restore: RestoreOrder | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The settings that the options mean.

        :raises Refused: they do not go together.
        """
        return cls(
            machine=_machine(options),
            incoming=options["incoming"],
            paused=options["paused"],
            monitors=monitors_of(options),
            qmps=tuple(place for place in options["qmps"] if place != NONE),
            name=options["name"],
            serial=options["serial"],
        )


def monitors_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the HMP monitors are.

    :raises Refused: two cannot share the standard input; or there is no such serial port.
    """
    monitors = tuple(options["monitors"])
    if not monitors and not options["qmps"] and sys.stdin.isatty():
        monitors = (STDIO,)
    if monitors.count(STDIO) > 1:
        raise Refused("--monitor stdio is given twice; there is one standard input")
    if options["serial"] not in {STDIO, NONE} and not options["serial"].startswith("file:"):
        raise Refused(f"no serial port at {options['serial']!r}; give stdio, none or file:PATH")
    return tuple(place for place in monitors if place != NONE)


def _machine(options: Mapping[str, Any]) -> MachineConfig:
    load_address = options["load_address"]
    config = MachineConfig(
        memory_bytes=options["memory"],
        vcpus=options["smp"],
        accel=options["accel"],
        image=_image(options),
        load_address=load_address,
        entry=load_address if options["entry"] is None else options["entry"],
        privilege=int(options["privilege"]),
        huge_pages=options["huge_pages"],
        machine_type=options["machine"],
    )
    config.check()
    return config


def _image(options: Mapping[str, Any]) -> bytes | None:
    image, name = options["image"], options["workload"]
    if options["incoming"] is not None:
        return None  # as with QEMU, a kernel may be named; what comes replaces it
    if bool(image) == bool(name):
        raise Refused("a guest needs just one of --image, --workload and --incoming; give one")
    if image:
        return read_image(image)
    return workload.load(name, options["memory"], options["smp"]).image()
