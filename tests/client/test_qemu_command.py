"""What of a QEMU's command line is of use to another QEMU."""

import os
import shlex

import pytest

from postcopy.client.qemu_command import command_of, without_monitors


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("-M pc -m 1G disk.raw", "-M pc -m 1G disk.raw"),
        ("-S -daemonize -m 1G -pidfile /run/pid", "-m 1G"),
        ("-incoming defer --incoming tcp:0:4444 -nographic", "-nographic"),
        ("-qmp unix:a,server=on -monitor none -enable-kvm -snapshot", "-enable-kvm -snapshot"),
        (
            "-chardev socket,id=m,path=x -mon chardev=m,mode=control -chardev pty,id=s -serial chardev:s",
            "-chardev pty,id=s -serial chardev:s",
        ),
        ("-chardev stdio,mux=on,id=m -mon m -S", ""),
        ("-monitor -S", ""),  # whatever follows is its value
        ("-append 'console=ttyS0 quiet' -kernel k", "-append 'console=ttyS0 quiet' -kernel k"),
        ("-S -nodefaults -loadvm", "-nodefaults"),
        ("-drive file=a -", "-drive file=a -"),
    ],
)
def test_what_is_kept(line, kept):
    assert shlex.join(without_monitors(["qemu", *shlex.split(line)])[1:]) == kept


def test_of_no_qemu_there_is_none():
    assert command_of(os.getpid()) is None
    assert command_of(1 << 30) is None
