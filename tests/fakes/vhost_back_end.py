"""``postcopy vhost-user-blk`` and ``qemu-storage-daemon``, and a guest of the tests' own at the socket."""

import signal
import subprocess
from functools import partial
from pathlib import Path

from fakes.commands import POSTCOPY
from fakes.qemu_versions import OLDEST, folder_of
from fakes.vhost_front_end import BlockDriver, FrontEnd, Ram, Ring
from fakes.waiting import wait_until
from machine.drives import make_disk

TIMEOUT_S = 30

_LISTENS = "00010000"
"""``__SO_ACCEPTCON`` of Linux's ``include/linux/net.h``."""


class Served:
    """A process that listens, until the end of the context."""

    def __init__(self, folder, command, stdin=subprocess.DEVNULL):
        folder.mkdir(exist_ok=True)
        self.path = folder / "vhost.sock"
        self._output = folder / "vhost.output"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=stdin, stdout=output, stderr=subprocess.STDOUT
            )
        wait_until(self._listens, TIMEOUT_S, "the socket")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(TIMEOUT_S)

    def _listens(self):
        assert self.process.poll() is None, self.said
        return _is_listened_at(self.path)

    @property
    def said(self):
        return self._output.read_text(errors="replace")

    def end(self, number=signal.SIGTERM):
        """Tell it to end; return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


def _is_listened_at(path):
    """As the kernel's list says; the file is there a little before, and a connection would be served."""
    sockets = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(each[3] == _LISTENS and each[7:] == [str(path)] for each in sockets)


class BackEnd(Served):
    """``postcopy vhost-user-blk``.

    :param within: a command that runs it.
    """

    def __init__(self, folder, disk, *options, within=()):
        command = [*within, *POSTCOPY, "vhost-user-blk", "--socket", str(folder / "vhost.sock")]
        super().__init__(folder, [*command, str(disk), *options])


class StorageDaemon(Served):
    """``qemu-storage-daemon``, with a disk that others may have open, too."""

    def __init__(self, folder, disk, version="10.0"):
        file = f"driver=file,node-name=f0,filename={disk},locking=off"
        where = f"addr.type=unix,addr.path={folder}/vhost.sock"
        export = f"type=vhost-user-blk,id=e0,node-name=d0,writable=on,{where}"
        program = folder_of(version) / "qemu-storage-daemon"
        command = [
            str(program),
            "--blockdev",
            file,
            "--blockdev",
            "driver=raw,node-name=d0,file=f0",
        ]
        super().__init__(folder, [*command, "--export", export])


BACK_ENDS = {
    "ours": BackEnd,
    "qemu": StorageDaemon,
    "oldest_qemu": partial(StorageDaemon, version=OLDEST),
}


class DiskOfJourney:
    """A disk, and the back ends of a journey's two sides."""

    def __init__(self, stack, folder, kind):
        self.path = make_disk(folder / "disk")
        self._stack, self._kind = stack, BACK_ENDS[kind]
        self._folders = [folder / name for name in ("one", "other")]
        self.back_ends = [self.start(number) for number in range(2)]

    def start(self, number):
        folder = self._folders[number]
        (folder / "vhost.sock").unlink(missing_ok=True)
        return self._stack.enter_context(self._kind(folder, self.path))

    def kill(self, number):
        """Have another one in its place."""
        self.back_ends[number].end(signal.SIGKILL)
        self.replace(number)

    def replace(self, number):
        self.back_ends[number] = self.start(number)

    @property
    def said(self):
        return "".join(each.said for each in self.back_ends)


class Guest:
    """A front end that has agreed on everything, with memory, a ring and a driver."""

    def __init__(self, path, *, ram=None, **agreed):
        self.front_end = FrontEnd.connect(path)
        self.ram = ram or Ram()
        self.ring = Ring(self.ram)
        self.driver = BlockDriver(self.ring)
        self.front_end.negotiate(**agreed)

    def start(self, **more):
        self.front_end.set_memory(self.ram)
        self.ring.set_up(self.front_end, **more)
        return self

    def close(self):
        self.front_end.close()
        self.ring.close()
        self.ram.close()
