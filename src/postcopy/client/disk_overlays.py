"""The disks of a real QEMU's guest, taken at the moment of a snapshot of its memory.

While the guest stands still, each disk that it may write to gets an empty overlay (``blockdev-snapshot``,
all of them in one ``transaction``).  The files below keep what was on the disks at that moment.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from postcopy.client.left_over import LeftOver, Overlay
from postcopy.client.qemu_jobs import run_job
from postcopy.client.qmp import QmpConnection
from postcopy.errors import PostcopyError, Refused
from postcopy.image.disks import Disk, FrozenDisks, file_name_of

_FILES: Final = frozenset({"file", "host_device"})
_FILTERS: Final = frozenset({
    "blkdebug", "blklogwrites", "blkreplay", "blkverify", "compress", "copy-before-write", "copy-on-read",
    "preallocate", "quorum", "snapshot-access", "throttle",
})  # fmt: skip
"""Drivers that store nothing themselves: what they do would end with an overlay above them."""


@dataclass(frozen=True, slots=True)
class _Overlay:
    """A disk, by its node in QEMU, and the file that the guest writes to afterwards."""

    name: str
    node: str
    inserted: Mapping[str, Any]
    base: str
    path: Path
    overlay_node: str

    @property
    def left_over(self) -> Overlay:
        return Overlay(self.overlay_node, self.node, str(self.path))

    @property
    def size_bytes(self) -> int:
        size: int = self.inserted["image"]["virtual-size"]
        return size

    def disk(self) -> Disk:
        form, below = self.inserted["drv"], tuple(_below(self.inserted["image"]))
        return Disk(self.name, self.base, form, self.size_bytes, below=below).as_it_is()


class DiskOverlays:
    """The overlays of one snapshot: made, put over the disks, and taken away again if it fails.

    :param folder: of the overlays, as QEMU's host sees it.
    :param image: of the memory; the overlays are named after it.
    """

    def __init__(self, machine: QmpConnection, folder: Path, image: Path) -> None:
        self._machine = machine
        self._folder = folder
        self._image = image
        self._overlays: list[_Overlay] = []
        self._was_running = False
        self._stopped_s = 0.0
        self._left = LeftOver(str(image))
        self.note: Callable[[LeftOver | None], None] = lambda _: None
        """Notes what the next command has to put back if this one is killed; ``None``: nothing."""
        self.frozen: FrozenDisks | None = None
        """The disks as they are kept, once the guest stands still."""
        self.pause_us: int | None = None
        """How long the guest stood still, or ``None``: it did not run."""

    @property
    def paths(self) -> dict[str, Path]:
        """The overlay of each disk, by the disk's name."""
        return {overlay.name: overlay.path for overlay in self._overlays}

    @property
    def untouched(self) -> bool:
        """Whether there is nothing to put back."""
        return not self._overlays and not self._was_running

    async def make(self) -> None:
        """Make an empty overlay for each disk that the guest may write to; the disks are not touched.

        :raises Refused: there is a disk that can have none.
        """
        if not self._folder.is_dir():
            raise Refused(f"{self._folder} is no folder; make it, or give another path")
        wanted = [each async for each in self._writable()]
        for overlay in wanted:
            if os.path.lexists(overlay.path):
                raise Refused(f"{overlay.path} exists; remove it, or give another folder")
        for overlay in wanted:
            self._overlays.append(overlay)
            self._left.overlays.append(overlay.left_over)
            self.note(self._left)
            await self._make(overlay)

    async def freeze(self) -> None:
        """Stop the guest, if it runs, and put the overlays over its disks."""
        self._was_running = bool((await self._machine.execute("query-status"))["running"])
        self._stopped_s = time.monotonic()
        if self._was_running:
            self._left.stopped = True
            self.note(self._left)
            await self._machine.execute("stop")
        actions = [
            {
                "type": "blockdev-snapshot",
                "data": {"node": each.node, "overlay": each.overlay_node},
            }
            for each in self._overlays
        ]
        if actions:
            await self._machine.execute("transaction", {"actions": actions})
        disks = tuple(overlay.disk() for overlay in self._overlays)
        self.frozen = FrozenDisks(disks, self._was_running)

    async def resume(self) -> None:
        """Let the guest go on, if it ran before."""
        was_running, self._was_running = self._was_running, False
        if was_running:
            await self._machine.execute("cont")
            self._left.stopped = False
            self.note(self._left)
            self.pause_us = round((time.monotonic() - self._stopped_s) * 1e6)

    async def put_back(self) -> str:
        """Take the overlays away, with what the guest has written to them put where it was before.

        :return: what became of the disks, for the text of an error.
        """
        try:
            await self.resume()
            for overlay in reversed(self._overlays):
                await overlay.left_over.remove(self._machine)
            self.note(None)
        except PostcopyError as error:
            left = ", ".join(str(path) for path in self.paths.values() if path.exists())
            return (
                f"the overlays of its disks are left ({left}), since the machine says: {error}; "
                "commit them (block-commit), and remove them"
            )
        return "its disks are as before" if self._overlays else "it has no disks"

    # --- one overlay

    async def _writable(self) -> AsyncIterator[_Overlay]:
        seen = set()
        for device in await self._machine.execute("query-block"):
            inserted = device.get("inserted")
            if inserted is None or inserted["ro"] or inserted["node-name"] in seen:
                continue
            seen.add(inserted["node-name"])
            yield await self._overlay(device, inserted)

    async def _overlay(self, device: Mapping[str, Any], inserted: Mapping[str, Any]) -> _Overlay:
        name = device["device"] or device.get("qdev") or inserted["node-name"]
        if inserted["drv"] in _FILTERS:
            raise Refused(
                f"disk {name}: its uppermost node is a filter ('{inserted['drv']}'), which would not "
                "work on an overlay; remove it for the length of the snapshot"
            )
        base = _file_of(inserted["image"]["filename"])
        if not base.startswith("/") and ":" not in base.partition("/")[0]:
            folder = _working_folder(self._machine)
            if folder is None:
                raise Refused(
                    f"disk {name}: QEMU opened {base} by a name relative to its folder, which cannot be "
                    "found; start QEMU with the absolute path"
                )
            base = str((folder / base).resolve())
        path = self._folder.absolute() / f"{self._image.name}.{file_name_of(name)}.qcow2"
        return _Overlay(
            name, inserted["node-name"], inserted, base, path, f"postcopy-{secrets.token_hex(4)}"
        )

    async def _make(self, overlay: _Overlay) -> None:
        inserted, path = overlay.inserted, str(overlay.path)
        cache = {key: inserted["cache"][key] for key in ("direct", "no-flush")}
        common = {"cache": cache, "discard": "unmap"}
        await self._create(driver="file", filename=path, size=0)
        file = {"driver": "file", "filename": path, "node-name": overlay.left_over.file_node}
        await self._machine.execute("blockdev-add", common | file)
        backing = {"backing-file": overlay.base, "backing-fmt": inserted["drv"]}
        size = overlay.size_bytes
        await self._create(driver="qcow2", file=overlay.left_over.file_node, size=size, **backing)
        node = {
            "driver": "qcow2",
            "node-name": overlay.overlay_node,
            "file": overlay.left_over.file_node,
        }
        more = {"backing": None, "detect-zeroes": inserted["detect_zeroes"]}
        await self._machine.execute("blockdev-add", common | node | more)
        with contextlib.suppress(OSError):  # it is another user's, or the disk is no file
            overlay.path.chmod(Path(overlay.base).stat().st_mode & 0o777)

    async def _create(self, **options: Any) -> None:
        await run_job(self._machine, "blockdev-create", options=options)


def _below(image: Mapping[str, Any]) -> Iterator[str]:
    while (image := image.get("backing-image") or {}) and "filename" in image:
        yield _file_of(image["filename"])


def _working_folder(machine: QmpConnection) -> Path | None:
    """Return the folder that a machine's relative paths begin at; ``None`` where it cannot be found."""
    try:
        return Path(os.readlink(f"/proc/{machine.process_id}/cwd"))  # noqa: PTH115
    except OSError:
        return None


def _file_of(filename: str) -> str:
    """Return the path in a node's name, or the name of what is no file.

    QEMU names a node by its options (``json:``) where those of the file's own header do not suffice.
    """
    if not filename.startswith("json:"):
        return filename
    options = json.loads(filename.removeprefix("json:"))
    while isinstance(options.get("file"), dict):
        options = options["file"]
    path = options.get("filename") or options.get("file.filename")
    return path if isinstance(path, str) and options.get("driver", "file") in _FILES else filename
