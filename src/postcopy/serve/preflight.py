"""Whether a QEMU would load an image, found out before anything is stopped or started for good.

A QEMU with the wanted command line is started, and does not run.  What it saves is what it can load: its
machine type, its RAM blocks and its devices are compared with those of the image.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from postcopy.client.qemu_jobs import file_uri
from postcopy.client.qmp import QmpConnection
from postcopy.errors import MigrationFailed, PostcopyError, Refused
from postcopy.image.base import Image
from postcopy.image.disks import Disk
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest, beside
from postcopy.serve.brief_qemu import brief_qemu
from postcopy.serve.clone_disks import make_overlays, names_any, plan
from postcopy.serve.restored_qemu import words_of

_POLL_S: Final = 0.01
_ENDS: Final = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to agree.

    :ivar image, qemu: what each has; ``-`` where it has none.
    :ivar problem: why the load would fail; ``None``: it does not for that.
    """

    what: str
    image: str
    qemu: str
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)


async def preflight(path: Path, command: str, *, lazy: bool) -> list[Check]:
    """Compare an image with the QEMU of a command line.

    :param lazy: its pages are to come by postcopy, which needs more of the host.
    :raises ImageError: it is no image.
    :raises Refused: QEMU cannot be started so, or has a device that cannot be migrated at all.
    :raises MigrationFailed: QEMU could not tell what it would load.
    """
    disks = Manifest.load(path).disks if beside(path).exists() else ()
    with (
        tempfile.TemporaryDirectory(prefix="postcopy-preflight-") as made,
        open_image(path) as image,
    ):
        folder = Path(made)
        if names_any(command, disks):  # it would write to them
            command, overlays = plan(command, disks, folder, path, 0)
            await make_overlays(command, overlays)
        async with brief_qemu([*words_of(command), "-S"]) as machine:
            found = [await _postcopy(machine)] if lazy else []
            await _save(machine, folder / "probe")
        with open_image(folder / "probe") as probe:
            return [*compared(image, probe), *found, *map(_disk, disks)]


def compared(image: Image, probe: Image) -> Iterator[Check]:
    """Compare an image with what the QEMU saves that is to load it."""
    differs = "another machine type" if image.machine_name != probe.machine_name else None
    yield Check("machine", image.machine_name, probe.machine_name, differs)
    yield from _blocks(image, probe)
    yield from _devices(image, probe)


def _blocks(image: Image, probe: Image) -> Iterator[Check]:
    theirs = {block.name: block.size_bytes for block in probe.blocks}
    for block in image.blocks:
        what, size = f"RAM block {block.name}", theirs.get(block.name)
        if size is None:
            yield Check(what, f"{block.size_bytes} bytes", "-", "QEMU has no such block")
        else:
            problem = None if size == block.size_bytes else "another size"
            yield Check(what, f"{block.size_bytes} bytes", f"{size} bytes", problem)


def _devices(image: Image, probe: Image) -> Iterator[Check]:
    theirs = {(each.name, each.instance): each.version for each in probe.sections}
    for section in image.sections:
        what, ours = f"device {section.name} {section.instance}", f"version {section.version}"
        version = theirs.get((section.name, section.instance))
        if version is None:
            yield Check(what, ours, "-", "QEMU has no such device, or not at that place")
        else:
            newer = section.version > version
            problem = "the image is of a newer version of it" if newer else None
            yield Check(what, ours, f"version {version}", problem)
    for name, instance in theirs.keys() - {(each.name, each.instance) for each in image.sections}:
        # It stays as it is after a reset: a guest of one CPU does not miss a second one.
        yield Check(f"device {name} {instance}", "-", f"version {theirs[name, instance]}")


async def _postcopy(machine: QmpConnection) -> Check:
    on = [{"capability": "postcopy-ram", "state": True}]
    off = [{"capability": "postcopy-ram", "state": False}]
    try:
        await machine.execute("migrate-set-capabilities", {"capabilities": on})
        await machine.execute("migrate-set-capabilities", {"capabilities": off})
    except PostcopyError as error:
        return Check("postcopy-ram", "needed", "refused", str(error))
    return Check("postcopy-ram", "needed", "can be had")


def _disk(disk: Disk) -> Check:
    damage = disk.damage()
    state = "as it was" if damage is None else "changed"
    return Check(f"disk {disk.name}", disk.path, state, damage)


async def _save(machine: QmpConnection, path: Path) -> None:
    try:
        await machine.execute("migrate", {"uri": await file_uri(machine, path)})
    except Refused as error:
        raise Refused(
            f"this QEMU cannot load any image: {error}; change its command line"
        ) from error
    answer: Mapping[str, Any] = {}
    while answer.get("status") not in _ENDS:
        answer = await machine.execute("query-migrate")
        await asyncio.sleep(_POLL_S)
    if answer["status"] != "completed":
        raise MigrationFailed(
            f"this QEMU cannot tell what it would load: {answer.get('error-desc', 'no reason given')}"
        )
    with contextlib.suppress(PostcopyError):
        await machine.execute("quit")
