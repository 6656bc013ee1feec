"""``postcopy preflight``: whether a QEMU would load an image, or take the guest of another."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from postcopy.cli.failures import CommandFailed
from postcopy.errors import Refused

if TYPE_CHECKING:
    from postcopy.serve.preflight import Check


_ADDRESSES = ("unix:", "tcp:")


@click.command(short_help="Show whether a QEMU would load an image, or take a running guest.")
@click.argument("guest", metavar="IMAGE|QMP-ADDRESS")
@click.option(
    "--qemu",
    "target",
    required=True,
    metavar="QMP-ADDRESS|COMMAND|saved",
    help="A machine that waits for a guest, or QEMU's command line.",
)
@click.option("--lazy", is_flag=True, help="Its memory is to come behind it, by postcopy.")
@click.option("--all", "show_all", is_flag=True, help="Show what agrees, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def preflight(guest: str, target: str, lazy: bool, show_all: bool, as_json: bool) -> None:
    """Compare an image, or a machine that runs, with the QEMU that is to have its guest.

    With a command line: machine type, RAM blocks, devices, disks.  That QEMU is started, does not run its
    guest, and ends.  With a QMP address (unix:PATH, tcp:HOST:PORT): machine type, RAM blocks, CPUs and
    their features, and of two machines the capabilities and parameters of both; nothing is changed.  Exit
    code 1: a load would fail, and each reason is one line.
    """
    from postcopy.cli import interrupts

    checks = interrupts.run(_checks(guest, target, lazy=lazy))
    wrong = [each for each in checks if each.problem is not None]
    if as_json:
        found = {
            "path": guest,
            "fits": not wrong,
            "checks": [each.to_json() for each in checks],
        }
        click.echo(json.dumps(found))
    else:
        for each in checks if show_all else wrong:
            click.echo(_line(each, guest))
    if wrong:
        count = "one reason" if len(wrong) == 1 else f"{len(wrong)} reasons"
        raise CommandFailed(
            f"this QEMU would not load {guest}, for {count}; change its command line"
            if not target.startswith(_ADDRESSES)
            else f"{guest} would not be taken, for {count}; change the command line or the settings of "
            "either end"
        )
    if not as_json:
        click.echo(f"{guest}: fits; {len(checks)} things were compared")


async def _checks(guest: str, target: str, *, lazy: bool) -> "list[Check]":
    from postcopy.cli.restore_qemu import saved_command
    from postcopy.client.qmp import QmpConnection
    from postcopy.serve.preflight import preflight as check
    from postcopy.serve.running_preflight import preflight_image, preflight_machine

    if not target.startswith(_ADDRESSES):
        if guest.startswith(_ADDRESSES):
            raise Refused(
                "a running guest is compared with a machine that waits; give --qemu its QMP address"
            )
        command = saved_command(Path(guest)) if target == "saved" else target
        return await check(Path(guest), command, lazy=lazy)
    async with contextlib.AsyncExitStack() as machines:
        waiting = await QmpConnection.connect(target)
        machines.push_async_callback(waiting.close)
        if not guest.startswith(_ADDRESSES):
            return await preflight_image(Path(guest), waiting, lazy=lazy)
        source = await QmpConnection.connect(guest)
        machines.push_async_callback(source.close)
        return await preflight_machine(source, waiting, lazy=lazy)


def _line(check: "Check", guest: str) -> str:
    if check.problem is None:
        return f"{check.what}: {check.image}"
    ours, theirs = ("source", "target") if guest.startswith(_ADDRESSES) else ("image", "QEMU")
    return f"{check.what}: {check.problem} ({ours}: {check.image}; {theirs}: {check.qemu})"
