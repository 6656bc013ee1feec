"""The device of ``docs/vhost_user.md`` is one, and survives a postcopy."""

import os
import re
import signal
import subprocess
import sys

import pytest

from fakes.vhost_back_end import TIMEOUT_S
from fakes.vhost_front_end import WRITE, FrontEnd, Ram, Ring
from fakes.vhost_postcopy import Destination
from fakes.waiting import wait_until
from house.project import ROOT


@pytest.fixture
def entropy(tmp_path):
    """The path of the socket of the example, as it stands in the manual."""
    page = (ROOT / "docs" / "vhost_user.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script, path = tmp_path / "entropy.py", tmp_path / "socket"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(path)])
    yield path
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 0
    assert not path.exists()


def test_it_fills_buffers_with_random_bytes(entropy):
    ram = Ram()
    with FrontEnd.connect(entropy) as front_end:
        front_end.negotiate()
        front_end.set_memory(ram)
        ring = Ring(ram)
        ring.set_up(front_end)
        head = ring.put((0x40000, 64, WRITE), (0x50000, 32, WRITE))
        ring.notify()
        assert ring.wait() == (head, 96)
        first, second = ram.bytes[0x40000:0x40040], ram.bytes[0x50000:0x50020]
        assert any(first)
        assert any(second)
        assert ram.bytes[0x40040:0x40080] == bytes(64)
        ring.close()
    ram.close()


@pytest.mark.userfaultfd
def test_it_waits_for_pages_in_a_postcopy(entropy):
    source = Ram()
    ours = Ring(source)
    ours.put((0x40000, 64, WRITE))
    with FrontEnd.connect(entropy) as front_end:
        front_end.negotiate()
        destination = Destination(front_end, source)
        ring = Ring(destination.ram)
        ring.set_up(front_end)
        memory = destination.ram.fd
        wait_until(lambda: os.pread(memory, 2, ring.used + 2) == b"\1\0", TIMEOUT_S, "the request")
        assert any(os.pread(memory, 64, 0x40000))
        assert destination.has_asked_for(0x40000)
        destination.end()
        destination.close()
        ring.close()
    ours.close()
    source.close()
