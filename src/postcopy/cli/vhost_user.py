"""``postcopy vhost-user-blk``: a disk for the guest of another process, by vhost-user."""

from pathlib import Path

import click

_MOST_QUEUES = 64


@click.command(
    "vhost-user-blk", short_help="Serve a raw file as a disk, to QEMU and others, by vhost-user."
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--socket",
    "path",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="A Unix socket to listen at.",
)
@click.option("--readonly", is_flag=True, help="Refuse writes, and say so to the driver.")
@click.option(
    "--num-queues",
    type=click.IntRange(1, _MOST_QUEUES),
    default=1,
    show_default=True,
    help="Rings; one thread serves them all.",
)
def vhost_user_blk(file: Path, path: Path, *, readonly: bool, num_queues: int) -> None:
    """Serve FILE, a raw image or a block device, until SIGTERM or Ctrl-C.

    One front end at a time, another when it has gone.  A guest that moves takes its disk along, by precopy
    and by postcopy: run one of these on each side, on the same file.  SIGUSR1 makes it look at the size of
    FILE again, and tell the guest.

    \b
    qemu-system-x86_64 -chardev socket,id=c0,path=PATH -device vhost-user-blk-pci,chardev=c0 \\
        -object memory-backend-memfd,id=mem,size=1G,share=on -M pc,memory-backend=mem -m 1G
    """  # noqa: D301 - click reads the backspace
    from postcopy.cli.process import notice
    from postcopy.vhost_user import serve
    from postcopy.vhost_user.device import BlockDevice
    from postcopy.virtio.disk import Disk

    cure = "give a file that can be read"
    if not readonly:
        cure = f"{cure} and written, or --readonly"
    disk = Disk(file, read_only=readonly, say=notice, cure=cure)
    try:
        serve(path, BlockDevice(disk, queues=num_queues), say=notice)
    finally:
        disk.close()
