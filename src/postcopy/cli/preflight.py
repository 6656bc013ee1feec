"""``postcopy preflight``: whether a QEMU would load an image."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from postcopy.cli.failures import CommandFailed

if TYPE_CHECKING:
    from postcopy.serve.preflight import Check


@click.command(short_help="Show whether a QEMU would load an image.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--qemu", "command", required=True, metavar="COMMAND|saved", help="QEMU's command line."
)
@click.option("--lazy", is_flag=True, help="Its memory is to come behind it, by postcopy.")
@click.option("--all", "show_all", is_flag=True, help="Show what agrees, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def preflight(path: Path, command: str, lazy: bool, show_all: bool, as_json: bool) -> None:
    """Compare the image PATH with a QEMU: machine type, RAM blocks, devices, disks.

    The QEMU is started, does not run its guest, and ends.  Exit code 1: a load would fail, and each reason
    is one line.
    """
    from postcopy.cli import interrupts
    from postcopy.cli.restore_qemu import saved_command
    from postcopy.serve.preflight import preflight as check

    if command == "saved":
        command = saved_command(path)
    checks = interrupts.run(check(path, command, lazy=lazy))
    wrong = [each for each in checks if each.problem is not None]
    if as_json:
        found = {
            "path": str(path),
            "fits": not wrong,
            "checks": [each.to_json() for each in checks],
        }
        click.echo(json.dumps(found))
    else:
        for each in checks if show_all else wrong:
            click.echo(_line(each))
    if wrong:
        count = "one reason" if len(wrong) == 1 else f"{len(wrong)} reasons"
        raise CommandFailed(
            f"this QEMU would not load {path}, for {count}; change its command line"
        )
    if not as_json:
        click.echo(f"{path}: fits; {len(checks)} things were compared")


def _line(check: "Check") -> str:
    if check.problem is None:
        return f"{check.what}: {check.image}"
    return f"{check.what}: {check.problem} (image: {check.image}; QEMU: {check.qemu})"
