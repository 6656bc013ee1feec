"""The options of ``postcopy run`` and ``postcopy restore``, checked against each other."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, get_args

from postcopy.cli.memory_settings import blocks_of, blocks_of_image
from postcopy.cli.prefork import import_ahead
from postcopy.cli.process import notice
from postcopy.errors import ImageError, Refused
from postcopy.image.file_kinds import check_no_image
from postcopy.link.guest.engine_slot import EnginePool
from postcopy.link.protocol import RestoreCommands
from postcopy.machine import back_ends, workload
from postcopy.machine.config import RAM_NAMES, MachineConfig, MachineType, read_image
from postcopy.machine.memory_blocks import MemoryBlock
from postcopy.restore_options import RestoreOptions
from postcopy.virtio.block import SECTOR_BYTES
from postcopy.virtio.disk import Disk

DEFER = "defer"
STDIO = "stdio"
NONE = "none"
_START_TIME_FIELD: Final = 21  # of /proc/PID/stat, in clock ticks since the host has started


@dataclass(frozen=True)
class RunSettings:
    """One guest's process.

    :param incoming: a URI to listen at, ``defer``, or None for a guest that boots.
    :param monitors: addresses of HMP monitors; ``stdio`` at most once.
    :param qmps: addresses of QMP monitors.
    :param metrics: addresses at which Prometheus finds metrics.
    :param serial: ``stdio``, ``none`` or ``file:PATH``.
    :param objects: as QEMU's ``--object`` writes them.
    :param tls: a folder of certificates, with which migrations are encrypted.
    :param restore: the image from which the guest runs, in place of ``incoming``.
    """

    machine: MachineConfig
    incoming: str | None
    paused: bool
    monitors: tuple[str, ...]
    qmps: tuple[str, ...]
    name: str | None
    serial: str
    restore: RestoreOptions | None = None
    objects: tuple[str, ...] = ()
    tls: str | None = None
    metrics: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Make them of the options of ``postcopy run``.

        :raises Refused: the options exclude each other.
        """
        return cls(
            machine=_machine(options),
            incoming=options["incoming"],
            paused=options["paused"],
            monitors=monitors_of(options),
            qmps=tuple(place for place in options["qmps"] if place != NONE),
            name=options["name"],
            serial=options["serial"],
            objects=tuple(options["objects"]),
            tls=options["tls"],
            metrics=tuple(options["metrics"]),
        )


def monitors_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the addresses of the HMP monitors.

    :raises Refused: two would share the standard input; or there is no such serial port.
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
    blocks = blocks_of(options, RAM_NAMES[options["machine"]])
    config = MachineConfig(
        memory_bytes=sum(block.size_bytes for block in blocks),
        vcpus=options["smp"],
        accel=options["accel"],
        image=_image(options, blocks),
        load_address=load_address,
        entry=load_address if options["entry"] is None else options["entry"],
        privilege=int(options["privilege"]),
        machine_type=options["machine"],
        blocks=blocks,
        drive=_drive(options),
        vhost_user_blk=options["vhost_user_blk"],
        vhost_user_net=options["vhost_user_net"],
    )
    _check(config)
    return config


def _check(config: MachineConfig) -> None:
    """Refuse what cannot be, and tell the user what will be slow."""
    config.check()
    for block in config.memory_blocks:
        if block.warning is not None:
            notice(block.warning)


def _drive(options: Mapping[str, Any]) -> str | None:
    """Return the path of the drive.

    :raises Refused: it belongs to an image, which a guest would overwrite.
    """
    drive: str | None = options["drive"]
    if drive is not None and Path(drive).exists():  # else the machine says what is wrong
        check_no_image(Path(drive))
    return drive


def _image(options: Mapping[str, Any], blocks: Sequence[MemoryBlock]) -> bytes | None:
    image, name = options["image"], options["workload"]
    if options["incoming"] is not None:
        return None  # as in QEMU, a kernel may be given; the incoming guest replaces it
    if bool(image) == bool(name):
        raise Refused("a guest needs just one of --image, --workload and --incoming; give one")
    if image:
        return read_image(image)
    if name == "net" and options["vhost_user_net"] is None:
        raise Refused(
            "the workload net needs a network that sends back; give --vhost-user-net SOCKET"
        )
    memory_bytes = sum(block.size_bytes for block in blocks)
    # Half of the memory would leave blocks out.
    hot_bytes = memory_bytes - workload.BASE_ADDRESS if len(blocks) > 1 else None
    made = workload.load(
        name,
        memory_bytes,
        options["smp"],
        hot_bytes=hot_bytes,
        disk_bytes=_disk_bytes(options),
    )
    return made.image()


def _disk_bytes(options: Mapping[str, Any]) -> int:
    drive = _drive(options)
    if drive is not None:
        with closing(Disk(drive)) as disk:
            return disk.sectors * SECTOR_BYTES
    socket = options["vhost_user_blk"]
    return 0 if socket is None else back_ends.disk_bytes(socket)


def restore_settings(options: Mapping[str, Any], engines: EnginePool) -> RunSettings:
    """Make the settings of the options of ``postcopy restore`` and of the image.

    :param engines: the next of these opens the image, and restores it.
    :raises Refused: the options exclude each other, or postcopy cannot run the image's machine.
    """
    path = Path(options["path"]).absolute()  # the engine gets the same path later
    if options["record"] and not options["lazy"]:
        raise Refused("--record-working-set records the first page faults; give --lazy too")
    return RunSettings(
        machine=_machine_of_image(path, options, engines),
        incoming=None,
        paused=options["paused"],
        monitors=monitors_of(options),
        qmps=tuple(place for place in options["qmps"] if place != NONE),
        name=options["name"],
        serial=options["serial"],
        restore=RestoreOptions(
            path=str(path),
            lazy=options["lazy"],
            prefetch=options["prefetch"],
            record=options["record"],
            began_ns=process_start_ns(),
        ),
        metrics=tuple(options["metrics"]),
    )


def process_start_ns() -> int:
    """Return the start of this process, on the monotonic clock, to a hundredth of a second."""
    text = Path("/proc/self/stat").read_text()
    ticks = int(text.rpartition(")")[2].split()[_START_TIME_FIELD - 2])
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - max(0, age_ns)


def _machine_of_image(path: Path, options: Mapping[str, Any], engines: EnginePool) -> MachineConfig:
    """Return the machine of an image, which the engine opens, and keeps open for the restore."""
    answer = engines.ask(RestoreCommands.look_at_image, str(path))
    import_ahead(lambda: answer.has_come)
    try:
        image = answer.wait()
    except ImageError as error:
        raise Refused(str(error)) from error
    machine = _machine_type(path, image.machine)
    blocks = blocks_of_image(options, path, image.blocks, RAM_NAMES[machine])
    config = MachineConfig(
        memory_bytes=sum(block.size_bytes for block in blocks),
        vcpus=_vcpus(path, image.vcpus),
        accel=options["accel"],
        transparent_huge_pages=not options["lazy"],
        machine_type=machine,
        blocks=blocks,
        drive=_drive(options),
        vhost_user_blk=options["vhost_user_blk"],
        vhost_user_net=options["vhost_user_net"],
    )
    _check(config)
    return config


def _machine_type(path: Path, name: str) -> MachineType:
    for known in get_args(MachineType):
        if known == name:
            machine: MachineType = known
            return machine
    raise Refused(
        f"{path}: it is of a machine '{name}'; ours are {', '.join(get_args(MachineType))}"
    )


def _vcpus(path: Path, count: int) -> int:
    if not count:
        raise Refused(f"{path}: it has no vCPU")
    return count
