"""Bytes that the kernel sends from where they lie: when it is done with them, and what it had to copy."""

import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fakes.waiting import wait_until
from postcopy.channel.sockets import SocketChannel
from postcopy.errors import ChannelBroken, HostCannot

SOURCES = Path(__file__).resolve().parent.parent.parent / "src"


def tcp_pair(receive_bytes=None):
    with socket.create_server(("127.0.0.1", 0)) as server:
        if receive_bytes is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return near, far


def pieces_of(*arrays):
    return np.array([(each.ctypes.data, each.nbytes) for each in arrays], np.uint64)


@pytest.fixture
def peers():
    """A channel that copies nothing, and a socket of whoever is at the other end."""
    near, far = tcp_pair()
    with SocketChannel(near, "tcp:peer") as channel, far:
        channel.send_uncopied()
        yield channel, far


def receive(far, count):
    data = bytearray()
    while len(data) < count and (piece := far.recv(1 << 20)):
        data += piece
    return bytes(data)


def in_thread(call):
    raised = []

    def run():
        try:
            call()
        except ChannelBroken as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_what_is_sent_arrives_and_over_loopback_has_been_copied(peers):
    channel, far = peers
    pages = np.random.default_rng(1).integers(0, 256, (64, 4096), np.uint8)
    assert not channel.finish_uncopied()  # nothing has been sent, so nothing was copied
    for _ in range(3):
        thread, raised = in_thread(lambda: channel.send_gathered(pieces_of(*pages)))
        assert receive(far, pages.nbytes) == pages.tobytes()
        thread.join()
        assert not raised
        assert channel.finish_uncopied()
        assert not channel.finish_uncopied()
    assert channel.sent_bytes == 3 * pages.nbytes


def test_only_tcp_can():
    near, far = socket.socketpair()
    says = (
        "^unix:peer: Zero copy send feature not detected in host kernel; switch zero-copy-send off$"
    )
    with far, SocketChannel(near, "unix:peer") as channel, pytest.raises(HostCannot, match=says):
        channel.send_uncopied()


def unread():
    """A channel with more to send than its peer takes."""
    near, far = tcp_pair(4096)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    channel = SocketChannel(near, "tcp:peer")
    channel.send_uncopied()
    data = np.ones(2 << 20, np.uint8)
    channel.send_gathered(pieces_of(data))
    return channel, far, data


def test_a_shutdown_ends_the_wait():
    channel, far, data = unread()
    thread, raised = in_thread(channel.finish_uncopied)
    wait_until(channel._sending.locked, 5, "nobody waits")
    channel.shutdown()
    thread.join()
    assert raised == ["tcp:peer: closed on this side"]
    channel.close()
    far.close()
    assert data.all()


def test_a_peer_that_goes_away_ends_the_wait():
    channel, far, data = unread()
    thread, raised = in_thread(channel.finish_uncopied)
    far.close()  # with unread bytes: it resets the connection
    thread.join()
    assert raised in ([], ["tcp:peer: Connection reset by peer"])  # or all notices were there
    channel.close()
    assert data.all()


CHILD = """
import os, socket, sys, threading
import numpy as np
from postcopy.channel.sockets import SocketChannel
from postcopy.errors import ChannelBroken
with socket.create_server(("127.0.0.1", 0)) as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    near = socket.create_connection(server.getsockname())
    far, _ = server.accept()
near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
channel = SocketChannel(near, "tcp:peer")
channel.send_uncopied()
data = np.arange(2 << 20).astype(np.uint8)
if os.geteuid() == 0:
    os.setuid(65534)  # root may lock what it likes

def receive():
    left = data.nbytes
    while left:
        left -= len(far.recv(left))

reader = threading.Thread(target=receive, daemon=True)
try:
    for start in range(0, data.nbytes, 128 << 10):
        piece = data[start : start + (128 << 10)]
        channel.send_gathered(np.array([(piece.ctypes.data, piece.nbytes)], np.uint64))
        if start == 0:
            reader.start()
    reader.join()
    channel.finish_uncopied()
    print("all sent")
except ChannelBroken as error:
    print(error)
"""
NOT_ENOUGH = (
    "tcp:peer: Process can't lock enough memory for using MSG_ZEROCOPY; raise the limit of locked memory "
    "(ulimit -l), or switch zero-copy-send off"
)


@pytest.mark.parametrize(
    ("limit_bytes", "says"),
    [(64 << 10, NOT_ENOUGH), (256 << 10, "all sent")],
    ids=["less than a call needs", "less than all calls need"],
)
def test_without_the_right_to_lock_memory(limit_bytes, says):
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit_bytes, limit_bytes)),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (says + "\n", "")
