"""``postcopy run`` and ``postcopy restore``: one guest with its monitors."""

import pathlib
from typing import Any

import click
from click.core import ParameterSource

from postcopy.cli.command_line import ACCELERATION, DRIVE, MONITORS, OBJECTS, Number, Size, options

_WORKLOADS = (
    "disk",
    "hammer",
    "idle",
    "net",
    "sweep",
)  # of machine/workload.py, which takes long to import
_LOAD_ADDRESS = 0x10000
_FOR_QEMU = ("preempt", "bandwidth", "count", "on_running", "overlay_dir", "ephemeral")


@click.command(short_help="Run a guest, or wait for an incoming one.")
@click.option("--image", type=click.Path(exists=True, dir_okay=False), help="Raw 64-bit code.")
@click.option(
    "--load-address",
    type=Number(),
    default=_LOAD_ADDRESS,
    metavar="ADDRESS",
    help=f"Where the image is put; default: {_LOAD_ADDRESS:#x}.",
)
@click.option(
    "--entry",
    type=Number(),
    metavar="ADDRESS",
    help="First instruction; default: the load address.",
)
@click.option(
    "--privilege",
    type=click.Choice(["0", "3"]),
    default="3",
    show_default=True,
    help="Ring in which the guest begins.",
)
@click.option(
    "--workload", type=click.Choice(_WORKLOADS), help="A guest that postcopy has built in."
)
@click.option(
    "--machine",
    "-M",
    type=click.Choice(["microvm", "none"]),
    default="microvm",
    show_default=True,
    help="QEMU's machine type; the same at both sides.",
)
@click.option(
    "--memory", "-m", type=Size("M"), show_default="512M", help="Size of the only RAM block."
)
@click.option("--smp", type=click.IntRange(1), default=1, show_default=True, help="vCPUs.")
@options(ACCELERATION)
@options(DRIVE)
@options(OBJECTS)
@click.option("--incoming", metavar="URI|defer", help="Wait for a guest at this URI.")
@options(MONITORS)
@click.pass_context
def run(context: click.Context, /, **given: Any) -> None:
    """Run a guest until 'quit', a signal or the end of the input.

    \b
    In one terminal:       postcopy run --incoming tcp:0:4444 --smp 2
    In another:            postcopy run --workload hammer --smp 2
    there, at the prompt:  migrate -d tcp:0:4444
    """  # noqa: D301 - click reads the backspace
    from postcopy.cli.guest_process import GuestProcess
    from postcopy.cli.run_settings import RunSettings

    context.exit(GuestProcess(RunSettings.of(given), context.obj.get("engines")).run())


@click.command(short_help="Run a guest from its image.")
@click.argument("path", type=click.Path(dir_okay=False))
@click.option("--lazy", is_flag=True, help="Run at once; memory is read as the guest touches it.")
@click.option(
    "--prefetch",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Read the recorded working set first.",
)
@click.option("--record-working-set", "record", is_flag=True, help="Record the first page faults.")
@click.option(
    "--qemu",
    metavar="COMMAND|saved",
    help="Start this QEMU for the guest, in place of our machine, or the one that was saved.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 1000),
    default=1,
    metavar="N",
    help="With --qemu: so many clones; {n} in COMMAND and ADDRESS is the number of each.",
)
@click.option(
    "--overlay-dir",
    type=click.Path(path_type=pathlib.Path),
    metavar="DIR",
    help="With --qemu: each QEMU writes to overlays of its own, here, over the image's disks.",
)
@click.option("--ephemeral", is_flag=True, help="With --qemu: the overlays are removed at the end.")
@click.option("--on-running", metavar="COMMAND", help="With --qemu: run this when a guest runs.")
@click.option("--preempt", is_flag=True, help="With --qemu --lazy: use postcopy-preempt.")
@click.option(
    "--bandwidth", type=Size("M"), metavar="SIZE", help="With --qemu: limit a second of the push."
)
@options(ACCELERATION)
@options(DRIVE)
@options(MONITORS)
@click.pass_context
def restore(context: click.Context, /, **given: Any) -> None:
    """Run the guest that is saved in PATH until 'quit', a signal or the end of the input.

    Memory, vCPUs and machine are those of the image.  With --lazy the guest runs at once.  Three times are
    printed on standard error: until it ran, until it had its working set, until it had all memory.

    With --qemu the guest runs in a stock QEMU, which is started with what it needs added.  Its process, its
    QMP socket and its times are printed on standard error; its exit code is that of the command.
    """
    if given["qemu"] is not None:
        from postcopy.cli.process import import_numpy

        import_numpy()
        from postcopy.cli import restore_qemu

        restore_qemu.check_options(context)
        context.exit(restore_qemu.run(given))
    for option in _FOR_QEMU:
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            from postcopy.errors import Refused

            raise Refused(f"--{option.replace('_', '-')} is for a QEMU; give --qemu too")
    from postcopy.link.guest.engine_slot import EnginePool

    engines = context.obj.get("engines") or EnginePool()
    engines.prepare()  # an engine starts while this process imports its modules
    try:
        context.exit(_restore(given, engines))
    finally:
        engines.close()


def _restore(options: dict[str, Any], engines: Any) -> int:
    from postcopy.cli.guest_process import GuestProcess
    from postcopy.cli.run_settings import restore_settings

    return GuestProcess(restore_settings(options, engines), engines).run()
