"""Disks for a QEMU that a saved guest wakes in: an overlay of its own over each of the image's.

The files of the image stay as they are.  QEMU's command line names them, as it did when the image was
taken; each name is replaced by that of an overlay.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from postcopy.client.qemu_command import program_of, split_command
from postcopy.client.qemu_jobs import run_job
from postcopy.client.qmp import QmpConnection
from postcopy.errors import ImageError, Refused
from postcopy.image.disks import Disk
from postcopy.serve.brief_qemu import brief_qemu

_FORMAT: Final = "qcow2"
_SEPARATORS: Final = re.compile(r"""[,=:"{}\[\]\s]""")

Edit = Callable[[str], "Overlay | None"]


@dataclass(frozen=True, slots=True)
class Overlay:
    """A file that one QEMU writes to, over a disk of the image."""

    disk: Disk
    path: Path


def check_disks(disks: Sequence[Disk], image: Path) -> None:
    """Refuse disks that are not as they were.

    :raises ImageError: one of them is not.
    """
    for disk in disks:
        if (damage := disk.damage()) is not None:
            raise ImageError(image, damage)


def plan(
    command: str, disks: Sequence[Disk], folder: Path, image: Path, number: int
) -> tuple[str, list[Overlay]]:
    """Name overlays, and put them into a command line in place of the disks.

    :param command: of QEMU, as a shell would split it.
    :param number: of the clone.
    :return: the new command line, and the overlays, which are not made yet.
    :raises Refused: the command does not name one of the disks, or in a way that cannot be changed.
    """
    overlays = [
        Overlay(disk, folder / f"{image.name}.{disk.file_name}.{number}.qcow2") for disk in disks
    ]
    words, used = split_command(command), set[Path]()

    def edit(path: str) -> Overlay | None:
        for overlay in overlays:
            if Path(path).resolve() in _files([overlay.disk]):
                used.add(overlay.path)
                return overlay
        return None

    edited = _Words(words, edit).edited()
    for overlay in overlays:
        if overlay.path not in used:
            raise Refused(
                f"the image's disk {overlay.disk.name} is {overlay.disk.path}, which --qemu does not name; "
                "give it there by that path, and an overlay takes its place"
            )
    return shlex.join(edited), overlays


def names_any(command: str, disks: Sequence[Disk]) -> bool:
    """Whether a command line names one of the disks anywhere, so that its QEMU may write to it."""
    files = _files(disks)
    for word in split_command(command):
        plain = word.replace(",,", ",")
        if any(re.search(rf"{re.escape(str(file))}($|[,\"])", plain) for file in files):
            return True  # with a comma in its name
        if any(Path(part).resolve() in files for part in _SEPARATORS.split(word) if part):
            return True
    return False


def _files(disks: Sequence[Disk]) -> set[Path]:
    """What a command line may name: a disk, or the file that it was an overlay of when QEMU began."""
    return {Path(path).resolve() for disk in disks for path in (disk.path, *disk.below)}


async def make_overlays(command: str, overlays: Sequence[Overlay]) -> None:
    """Make the files, empty, by the QEMU of a command line, which ends again.

    :raises Refused: one exists, or QEMU cannot make it.
    """
    for overlay in overlays:
        if os.path.lexists(overlay.path):
            raise Refused(f"{overlay.path} exists; remove it, or give another folder")
    words = split_command(command)
    line = [*words[: program_of(words) + 1], "-M", "none", "-display", "none", "-nodefaults", "-S"]
    try:
        async with brief_qemu(line) as machine:
            for overlay in overlays:
                await _make(machine, overlay)
    except BaseException:
        for overlay in overlays:
            overlay.path.unlink(missing_ok=True)  # it was not there before
        raise


async def _make(machine: QmpConnection, overlay: Overlay) -> None:
    path, disk = str(overlay.path), overlay.disk
    await run_job(
        machine, "blockdev-create", options={"driver": "file", "filename": path, "size": 0}
    )
    await run_job(
        machine,
        "blockdev-create",
        options={
            "driver": _FORMAT,
            "file": {"driver": "file", "filename": path},
            "size": disk.size_bytes,
            "backing-file": disk.path,
            "backing-fmt": disk.format,
        },
    )


class _Words:
    """A command line of QEMU, whose disks are replaced."""

    def __init__(self, words: Sequence[str], edit: Edit) -> None:
        self._words = words
        self._edit = edit
        self._replaced: set[str] = set()

    def edited(self) -> list[str]:
        """Replace the paths of disks, and then the formats of nodes above them."""
        once = self._each(self._paths)
        self._words = once
        return self._each(self._formats)

    def _each(self, change: Callable[[str, str], str]) -> list[str]:
        found, option = list(self._words[:1]), ""
        for word in self._words[1:]:
            if word.startswith("-") and word != "-":
                option = word.lstrip("-")
                found.append(word)
            else:
                found.append(change(option, word))
                option = ""
        return found

    def _paths(self, option: str, word: str) -> str:
        if option == "drive":
            return self._drive(word)
        if option == "blockdev":
            return self._node(word)
        # -hda and the like, or a disk without an option, whatever stands in front of it.
        overlay = self._edit(word)
        return word if overlay is None else str(overlay.path)

    def _drive(self, word: str) -> str:
        values = _split(word)
        key = next((key for key in ("file", "file.filename") if key in values), None)
        overlay = None if key is None else self._edit(values[key])
        if key is None or overlay is None:
            return word
        return _join(values | {key: str(overlay.path), "format": _FORMAT})

    def _node(self, word: str) -> str:
        node = _Node(word)
        overlay = None if node.path is None else self._edit(node.path)
        if overlay is None:
            return word
        node.set_path(str(overlay.path))
        if node.has_format:
            node.set_format()
        elif node.name is not None:
            self._replaced.add(node.name)
        return node.word()

    def _formats(self, option: str, word: str) -> str:
        if option != "blockdev":
            return word
        node = _Node(word)
        if node.below not in self._replaced:
            return word
        node.set_format()
        return node.word()


class _Node:
    """The value of one ``-blockdev``: JSON, or keys with dots."""

    def __init__(self, word: str) -> None:
        self._is_json = word.startswith("{")
        self._word = word
        self._values: dict[str, Any] = _flat(_parsed(word)) if self._is_json else _split(word)

    @property
    def name(self) -> str | None:
        return self._values.get("node-name")

    @property
    def below(self) -> str | None:
        """The node that it is a format of, if that has a definition of its own."""
        return self._values.get("file")

    @property
    def path(self) -> str | None:
        return self._values.get("file.filename") or self._values.get("filename")

    @property
    def has_format(self) -> bool:
        return "file.filename" in self._values

    def set_path(self, path: str) -> None:
        self._values["file.filename" if self.has_format else "filename"] = path

    def set_format(self) -> None:
        if {"offset", "size"} & self._values.keys():
            raise Refused(
                f"--qemu has a part of a disk ({self._word}), which no overlay can replace"
            )
        self._values["driver"] = _FORMAT

    def word(self) -> str:
        return json.dumps(self._values) if self._is_json else _join(self._values)


def _parsed(word: str) -> Mapping[str, Any]:
    try:
        found = json.loads(word)
    except ValueError as error:
        raise Refused(f"--qemu has a -blockdev {word!r} that is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(f"--qemu has a -blockdev {word!r} that is no object")
    return found


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Objects inside one as keys with dots, which QEMU takes in JSON, too."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = value
    return found


def _split(word: str) -> dict[str, str]:
    """QEMU's own list of options: ``key=value`` with commas between, a comma in a value twice."""
    values = {}
    for part in word.replace(",,", "\0").split(","):
        key, _, value = part.replace("\0", ",").partition("=")
        values[key] = value
    return values


def _join(values: Mapping[str, str]) -> str:
    return ",".join(
        f"{key}={value}".replace(",", ",,") if value else key for key, value in values.items()
    )
