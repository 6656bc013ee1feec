"""``postcopy restore``: one guest that wakes from an image, with its monitors."""

from typing import Any

import click

from postcopy.cli.run_options import ACCELERATION, MONITORS, options


@click.command(short_help="Wake a guest from its image.")
@click.argument("path", type=click.Path(dir_okay=False))
@click.option(
    "--lazy", is_flag=True, help="Run at once; memory comes as it is touched, and behind."
)
@click.option(
    "--prefetch",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Bring the recorded working set first.",
)
@click.option("--record-working-set", "record", is_flag=True, help="Note what is touched first.")
@options(ACCELERATION)
@options(MONITORS)
@click.pass_context
def restore(context: click.Context, /, **given: Any) -> None:
    """Wake the guest that sleeps in PATH, and run it until 'quit', a signal or the end of the input.

    Memory, vCPUs and machine are those of the image.  With --lazy the guest runs at once.  On standard
    error stand the three times: until it ran, until it had what it touches first, until it had all.
    """
    from postcopy.link.guest.engine_process import EnginePool

    engines = context.obj.get("engines") or EnginePool()
    engines.prepare()  # an engine starts while we import what we need ourselves
    try:
        context.exit(_run(given, engines))
    finally:
        engines.close()


def _run(options: dict[str, Any], engines: Any) -> int:
    from postcopy.cli.guest_process import GuestProcess
    from postcopy.cli.restore_settings import restore_settings

    return GuestProcess(restore_settings(options, engines), engines).run()
