"""``postcopy restore --qemu``: a saved guest wakes in a stock QEMU, which is a child of this process."""

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from postcopy.cli import interrupts
from postcopy.cli.process import notice
from postcopy.errors import Refused
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.serve.restored_qemu import QemuOptions, RestoredQemu
from postcopy.serve.server import ServeOptions
from postcopy.statistics import RamStatistics

_TAKEN: Final = frozenset({"path", "qemu", "lazy", "paused", "qmps", "preempt", "bandwidth"})


def check_options(context: click.Context) -> None:
    """Refuse options that are about a machine of ours.

    :raises Refused: one was given.
    """
    for option in context.command.params:
        assert option.name is not None
        given = context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        if given and option.name not in _TAKEN:
            raise Refused(f"{option.opts[0]} is not for a QEMU; put its own option into --qemu")
    if context.params["preempt"] and not context.params["lazy"]:
        raise Refused("--preempt is about pages that come later; give --lazy too")


def run(given: Mapping[str, Any]) -> int:
    """Start QEMU with the guest, and stay until its end; return its exit code."""
    options = QemuOptions(
        command=given["qemu"],
        paused=given["paused"],
        qmps=tuple(given["qmps"]),
        serve=ServeOptions(given["lazy"], given["preempt"], given["bandwidth"] or 0),
    )
    return interrupts.run(_run(Path(given["path"]), options))


async def _run(path: Path, options: QemuOptions) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.closing(RestoreImage(path)) as opened:
        return await _one(opened, options)


async def _one(opened: RestoreImage, options: QemuOptions) -> int:
    async with RestoredQemu(opened, options) as qemu:
        await qemu.start()
        where = ", ".join(qemu.qmps)
        notice(f"QEMU {qemu.pid} has the guest after {qemu.running_s:.3f} s; QMP at {where}")
        info = await qemu.complete()
        ram = info.ram or RamStatistics()
        notice(
            f"QEMU {qemu.pid} has all memory after {(info.total_time_ms or 0) / 1000:.3f} s: "
            f"{ram.normal} pages with data, {ram.duplicate} zero, {ram.postcopy_requests} requested"
        )
        return await qemu.wait()
