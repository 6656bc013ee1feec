"""A guest that wakes does not wait for what it does not need: which modules have been imported by then."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from cli.test_run import children, ended
from fakes.commands import need_kvm
from fakes.pair import DEADLINE_S
from fakes.waiting import wait_until
from postcopy import sync
from postcopy.cli.prefork import engines_for
from postcopy.kernel import patience

TOLD = """
import os, sys

def tell(who, call):
    def told(self, first, *others):
        answer = call(self, first, *others)
        if who == "guest" or first.__name__ == "wake":
            os.write(1, (who + " " + " ".join(sys.modules) + "\\n").encode())
        return answer
    return told

from postcopy.link.rpc import Link
from postcopy.machine.machine import Machine
Link.call = tell("engine", Link.call)
Machine.load_devices = tell("guest", Machine.load_devices)

from postcopy.cli import main
main()
"""

NOBODY = {
    "asyncio",
    "concurrent.futures",
    "hashlib",
    "importlib.metadata",
    "multiprocessing",
    "qemu",
    "rich",
    "ssl",
    "subprocess",
    "tempfile",
    "unicorn",
    "zstandard",
    "postcopy.client",
    "postcopy.channel.connect",
    "postcopy.channel.listen",
    "postcopy.source.source",
    "postcopy.destination.destination",
    "postcopy.snapshot.background",
    "postcopy.image.chunked",
    "postcopy.image.stream",
    "postcopy.stream.decoder",
    "postcopy.stream.records",
}
"""What neither of the two processes needs before the guest runs."""
NO_GUEST = NOBODY | {"numpy", "blake3", "postcopy.lazy_restore.restore"}
NO_ENGINE = NOBODY | {"click", "postcopy.link.guest.control", "postcopy.monitor.server"}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    need_kvm()
    path = tmp_path_factory.mktemp("images") / "image"
    with sync.Machine.start(workload="hammer", memory="64M") as guest:
        guest.snapshot(path)
    return path


def restoring(image, *command):
    """A process that wakes the guest of an image, and says nothing of itself but on its output."""
    return subprocess.Popen(
        [sys.executable, *command, "restore", str(image), "--lazy", "--monitor", "none"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """End it; what it has said."""
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=DEADLINE_S)


def test_neither_process_imports_what_the_guest_would_wait_for(image):
    process = restoring(image, "-c", TOLD)
    imported = dict(process.stdout.readline().split(" ", 1) for _ in range(2))
    finish(process)
    imported = {who: set(modules.split()) for who, modules in imported.items()}
    assert imported.keys() == {"guest", "engine"}
    assert imported["guest"] & NO_GUEST == set()
    assert imported["engine"] & NO_ENGINE == set()


def maps(process: Path) -> str:
    try:
        return (process / "maps").read_text()
    except OSError:
        return ""  # it has just ended


def test_the_engine_is_a_process_of_its_own(image):
    """A process group, an input and descriptors of its own; and it ends with its guest's process.

    The session is its guest's: the kernel shares CPUs out among sessions.
    """
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    process = subprocess.Popen(
        [sys.executable, "-m", "postcopy", "restore", str(image), "--lazy", "--monitor", "none"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
    )
    os.close(writer)
    wait_until(lambda: children(process.pid), DEADLINE_S, "an engine")
    (engine,) = children(process.pid)
    wait_until(lambda: str(image) in maps(engine), DEADLINE_S, "the image in the engine")
    number = int(engine.name)
    assert (os.getsid(number), os.getpgid(number)) == (os.getsid(process.pid), number)
    assert (engine / "fd/0").readlink() == Path(os.devnull)
    inherited = f"pipe:[{os.fstat(reader).st_ino}]"
    assert inherited not in {str(link.readlink()) for link in (engine / "fd").iterdir()}
    os.close(reader)
    process.kill()
    process.wait(DEADLINE_S)
    wait_until(lambda: ended(engine), DEADLINE_S, "the engine's end")


def test_without_room_for_a_process_there_is_none(monkeypatch):
    """The command goes on; what needs an engine says so when it has none."""
    no_room = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    monkeypatch.setattr(os, "fork", Mock(side_effect=no_room))
    monkeypatch.setattr(patience, "LASTING_S", 0.01)
    assert engines_for(["restore", "image"]) is None
