"""Our QMP server on a fake backend, a bare QMP client, and a real QEMU to compare with."""

import json
import socket
import subprocess

import pytest

from fakes.monitor_backend import make_backend
from fakes.qemu_versions import BINARY
from postcopy.monitor.server import serve_qmp

DEADLINE_SECONDS = 20


class BareClient:
    """Sends bytes and reads lines.

    :ivar ownership: what the last answer said besides QEMU's members: whose the guest is.
    :ivar reason: what the last answer said besides QEMU's members of an error: its kind.
    """

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_SECONDS)
        self.socket.connect(str(path))
        self._file = self.socket.makefile("rb")
        self.greeting = self.read()
        self.events = []

    def read(self):
        line = self._file.readline()
        assert line.endswith(b"\r\n"), line
        return json.loads(line)

    def send(self, data):
        self.socket.sendall(data if isinstance(data, bytes) else json.dumps(data).encode())

    def reply(self):
        while "event" in (message := self.read()):
            self.events.append(message)
        found = message.get("return")
        if isinstance(found, dict):
            self.ownership = {n: found.pop(n) for n in ("x-owner", "x-last-order") if n in found}
        self.reason = message.get("error", {}).pop("x-reason", None)
        return message

    def ask(self, data):
        self.send(data)
        return self.reply()

    def execute(self, name, **arguments):
        request = {"execute": name}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        return self.ask(request)

    def human(self, line):
        return self.execute("human-monitor-command", command_line=line)["return"]

    def negotiate(self, *enable):
        assert self.execute("qmp_capabilities", enable=list(enable)) == {"return": {}}
        return self

    def close(self):
        self._file.close()
        self.socket.close()


@pytest.fixture
def backend():
    return make_backend()


@pytest.fixture
def server(backend, tmp_path):
    server = serve_qmp(f"unix:{tmp_path}/ours", backend)
    yield server
    server.close()


@pytest.fixture
def connect(server, tmp_path):
    """Makes new clients of our server."""
    clients = []

    def make():
        clients.append(BareClient(tmp_path / "ours"))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def ours(connect):
    return connect()


@pytest.fixture
def theirs(tmp_path):
    """A client of a real QEMU, not negotiated yet."""
    with socket.socket(socket.AF_UNIX) as listener:
        # QEMU gets a listening socket, so that nobody has to wait for it to appear.
        listener.bind(str(tmp_path / "theirs"))
        listener.listen()
        fd = listener.fileno()
        process = subprocess.Popen(
            [
                BINARY, "-M", "none", "-m", "64M", "-nodefaults", "-display", "none",
                "-chardev", f"socket,id=c,fd={fd},server=on,wait=off", "-mon", "chardev=c,mode=control",
                # We do not send it either: older ones do not know it.
                "-global", "migration.send-switchover-start=off",
            ],
            pass_fds=[fd],
        )  # fmt: skip
    try:
        client = BareClient(tmp_path / "theirs")
        yield client
        client.close()
    finally:
        process.kill()
        process.wait()
