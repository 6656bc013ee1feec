"""``postcopy vhost-user-blk`` and ``qemu-storage-daemon``, and a guest of the tests' own at the socket."""

import signal
import subprocess

from fakes.commands import POSTCOPY
from fakes.qemu_versions import folder_of
from fakes.vhost_front_end import BlockDriver, FrontEnd, Ram, Ring
from fakes.waiting import wait_until

TIMEOUT_S = 30


class _Served:
    """A process that listens, until the end of the context."""

    def __init__(self, folder, command):
        folder.mkdir(exist_ok=True)
        self.path = folder / "vhost.sock"
        self._stderr = folder / "vhost.stderr"
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, stdin=subprocess.DEVNULL)
        wait_until(self._listens, TIMEOUT_S, "the socket")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(TIMEOUT_S)

    def _listens(self):
        assert self.process.poll() is None, self.said
        return self.path.is_socket()

    @property
    def said(self):
        return self._stderr.read_text()

    def end(self, number=signal.SIGTERM):
        """Tell it to end; return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


class BackEnd(_Served):
    """``postcopy vhost-user-blk``.

    :param within: a command that runs it.
    """

    def __init__(self, folder, disk, *options, within=()):
        command = [*within, *POSTCOPY, "vhost-user-blk", "--socket", str(folder / "vhost.sock")]
        super().__init__(folder, [*command, str(disk), *options])


class StorageDaemon(_Served):
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
