"""What stands at the path of a monitor's socket already, and what stands there when the monitor closes."""

import socket

import pytest

from fakes.monitor_backend import make_backend
from postcopy.errors import CannotListen
from postcopy.monitor.server import serve_qmp


def refused(path):
    with pytest.raises(CannotListen) as caught:
        serve_qmp(f"unix:{path}", make_backend())
    assert str(caught.value) == f"cannot listen at unix:{path}: Address already in use"


def test_a_file_stays(tmp_path):
    path = tmp_path / "monitor"
    path.write_text("of somebody")
    refused(path)
    assert path.read_text() == "of somebody"


@pytest.mark.parametrize("waiting", [0, 3], ids=["free", "full"])
def test_a_socket_that_is_listened_at_stays(tmp_path, waiting):
    """Also one at which as many wait already as may: the kernel refuses more for another reason."""
    path = tmp_path / "monitor"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen(0)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(waiting)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(str(path))
        refused(path)
        for client in clients:
            client.close()
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect_ex(str(path))
        assert path.is_socket()


def test_a_socket_of_another_kind_stays(tmp_path):
    path = tmp_path / "monitor"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as theirs:
        theirs.bind(str(path))
        refused(path)
        assert path.is_socket()


def test_what_a_killed_process_has_left_is_replaced(tmp_path):
    path = tmp_path / "monitor"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
    server = serve_qmp(f"unix:{path}", make_backend())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert b"QMP" in client.recv(1 << 16)
    server.close()
    assert not path.exists()


def test_what_others_have_put_there_meanwhile_stays(tmp_path):
    path = tmp_path / "monitor"
    server = serve_qmp(f"unix:{path}", make_backend())
    path.rename(tmp_path / "kept")  # or its inode's number would be free for the file
    path.write_text("of somebody")
    server.close()
    assert path.read_text() == "of somebody"
