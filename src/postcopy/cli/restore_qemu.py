"""``postcopy restore --qemu``: a saved guest wakes in a stock QEMU, which is a child of this process."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from postcopy.cli import interrupts
from postcopy.cli.failures import FAILED, CommandFailed
from postcopy.cli.process import notice
from postcopy.errors import PostcopyError, Refused
from postcopy.image.disks import Disk
from postcopy.image.manifest import Manifest, beside
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.serve.clone_disks import Overlay, check_disks, make_overlays, names_any, plan
from postcopy.serve.restored_qemu import QemuOptions, RestoredQemu
from postcopy.serve.server import ServeOptions
from postcopy.statistics import RamStatistics

_TAKEN: Final = frozenset({
    "path", "qemu", "lazy", "paused", "qmps", "preempt", "bandwidth", "count", "on_running",
    "overlay_dir", "ephemeral",
})  # fmt: skip
_SAVED: Final = "saved"
_NUMBER: Final = "{n}"
"""Stands for the number of a clone, from 0 on, in QEMU's command and in addresses."""


@dataclass(frozen=True, slots=True)
class _Clone:
    """One QEMU to be started.

    :ivar about: what its lines begin with.
    :ivar hook: a shell command to be run when its guest runs; None: none.
    """

    number: int
    about: str
    options: QemuOptions
    hook: str | None
    disks: tuple[Overlay, ...]
    ephemeral: bool


def check_options(context: click.Context) -> None:
    """Refuse options that are about a machine of ours, and some that exclude each other.

    :raises Refused: one was given.
    """
    for option in context.command.params:
        assert option.name is not None
        given = context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        if given and option.name not in _TAKEN:
            raise Refused(f"{option.opts[0]} is not for a QEMU; put its own option into --qemu")
    if context.params["preempt"] and not context.params["lazy"]:
        raise Refused("--preempt is about pages that come later; give --lazy too")
    if context.params["count"] > 1 and any(_NUMBER not in qmp for qmp in context.params["qmps"]):
        raise Refused(f"several QEMUs cannot have one QMP address; write {_NUMBER} into --qmp")


def run(given: Mapping[str, Any]) -> int:
    """Start QEMU with the guest, and stay until its end; return its exit code."""
    path, command = Path(given["path"]), given["qemu"]
    if command == _SAVED:
        command = saved_command(path)
        notice(f"starting: {command}")
    with contextlib.ExitStack() as folders:
        disks = _Disks.choose(path, command, given, folders)
        clones = [_clone(given, command, number, disks) for number in range(given["count"])]
        return interrupts.run(_run(path, clones))


@dataclass(frozen=True, slots=True)
class _Disks:
    """The image's disks, and where the overlays over them are to be.

    :ivar kept: of an image without disks, or of a command line that does not use them, there are none.
    """

    image: Path
    kept: tuple[Disk, ...]
    folder: Path
    ephemeral: bool

    @classmethod
    def choose(
        cls, path: Path, command: str, given: Mapping[str, Any], folders: contextlib.ExitStack
    ) -> "_Disks":
        """Find out which overlays are wanted.

        :raises Refused: none are, and QEMU would write to the image's disks.
        :raises ImageError: a disk is not as it was.
        """
        disks = Manifest.load(path).disks if beside(path).exists() else ()
        folder, ephemeral = given["overlay_dir"], given["ephemeral"]
        if not disks and (folder is not None or ephemeral):
            raise Refused(
                f"{path} has no disks to put overlays over; take it with 'postcopy snapshot --disks'"
            )
        wanted = folder is not None or ephemeral
        if not wanted and names_any(command.replace(_NUMBER, "0"), disks):
            raise Refused(
                f"QEMU would write to the disks of {path}, which must stay as they are; give "
                "--overlay-dir DIR or --ephemeral"
            )
        if not wanted:
            return cls(path, (), path, ephemeral=False)
        check_disks(disks, path)
        if folder is None:
            made = tempfile.TemporaryDirectory(prefix="postcopy-overlays-")
            folder = Path(folders.enter_context(made))
        if not folder.is_dir():
            raise Refused(f"{folder} is no folder; make it, or give another")
        return cls(path, disks, folder.absolute(), ephemeral)


def _clone(given: Mapping[str, Any], command: str, number: int, disks: _Disks) -> _Clone:
    command = command.replace(_NUMBER, str(number))
    command, overlays = plan(command, disks.kept, disks.folder, disks.image, number)
    options = QemuOptions(
        command=command,
        paused=given["paused"],
        qmps=tuple(qmp.replace(_NUMBER, str(number)) for qmp in given["qmps"]),
        serve=ServeOptions(given["lazy"], given["preempt"], given["bandwidth"] or 0),
    )
    about = "QEMU" if given["count"] == 1 else f"clone {number}: QEMU"
    return _Clone(number, about, options, given["on_running"], tuple(overlays), disks.ephemeral)


def saved_command(path: Path) -> str:
    """The command line that the image was saved with.

    :raises Refused: the image does not have it.
    """
    if not beside(path).exists() or (command := Manifest.load(path).command) is None:
        raise Refused(f"{path} does not tell its QEMU's command line; write that into --qemu")
    return command


async def _run(path: Path, clones: list[_Clone]) -> int:
    """Run all of them to their ends; return the first exit code that is not 0."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    overlays = [overlay for clone in clones for overlay in clone.disks]
    with contextlib.closing(RestoreImage(path)) as opened, contextlib.ExitStack() as left:
        if overlays:
            await make_overlays(clones[0].options.command, overlays)
        for clone in clones:
            left.callback(_remove_ephemeral, clone)
        if len(clones) == 1:
            return await _one(opened, clones[0])
        tasks = [asyncio.create_task(_one_of_many(opened, clone)) for clone in clones]
        try:
            return next(filter(None, await asyncio.gather(*tasks)), 0)
        finally:
            for each in tasks:
                if not each.cancelling():  # a second cancel would end its clean-up
                    each.cancel()
            await asyncio.wait(tasks)


async def _one_of_many(opened: RestoreImage, clone: _Clone) -> int:
    """As :func:`_one`; a failure is of this one alone, and the others go on."""
    try:
        return await _one(opened, clone)
    except (PostcopyError, CommandFailed) as error:
        notice(f"clone {clone.number}: {error}")
        return FAILED


async def _one(opened: RestoreImage, clone: _Clone) -> int:
    try:
        return await _until_its_end(opened, clone)
    finally:
        _remove_ephemeral(clone)  # the others may run for long


def _remove_ephemeral(clone: _Clone) -> None:
    for overlay in clone.disks if clone.ephemeral else ():
        overlay.path.unlink(missing_ok=True)


async def _until_its_end(opened: RestoreImage, clone: _Clone) -> int:
    async with RestoredQemu(opened, clone.options) as qemu:
        await qemu.start()
        about = f"{clone.about} {qemu.pid}"
        where = ", ".join(qemu.qmps)
        notice(f"{about} has the guest after {qemu.running_s:.3f} s; QMP at {where}")
        if clone.hook is not None:
            await _run_hook(clone.hook, clone.number, qemu)
        info = await qemu.complete()
        ram = info.ram or RamStatistics()
        notice(
            f"{about} has all memory after {(info.total_time_ms or 0) / 1000:.3f} s: "
            f"{ram.normal} pages with data, {ram.duplicate} zero, {ram.postcopy_requests} requested"
        )
        return await qemu.wait()


async def _run_hook(hook: str, number: int, qemu: RestoredQemu) -> None:
    """Run the user's command; the memory goes on to arrive meanwhile.

    :raises CommandFailed: it has failed.
    """
    known = {
        "POSTCOPY_CLONE": str(number),
        "POSTCOPY_QEMU_PID": str(qemu.pid),
        "POSTCOPY_QMP": qemu.qmps[0],
    }
    process = await asyncio.create_subprocess_shell(hook, env=os.environ | known)
    try:
        code = await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    if code:
        raise CommandFailed(
            f"--on-running '{hook}' has failed with exit code {code}; QEMU was ended"
        )
