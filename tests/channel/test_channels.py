"""Channels over real sockets, pipes, files and commands."""

import array
import fcntl
import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from fakes.waiting import is_inside, wait_until
from postcopy.channel.address import (
    ExecAddress,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
)
from postcopy.channel.connect import connect
from postcopy.channel.exec_command import CommandChannel
from postcopy.channel.listen import Listener
from postcopy.errors import CannotConnect, CannotListen, ChannelBroken, Refused

SIOCOUTQNSD = 0x894B  # linux/sockios.h: bytes that have not been sent at all
LARGEST_SEGMENT_BYTES = 64 << 10


def read_all(channel):
    data = bytearray()
    room = memoryview(bytearray(65536))
    while n_bytes := channel.receive_into(room):
        data += room[:n_bytes]
    return bytes(data)


def in_thread(work):
    """Start it; its value, or what it raised, is in the list once the thread is joined."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except Exception as failure:  # the test looks at it
            outcome.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


@pytest.fixture(params=["tcp", "tcp6", "unix", "fd"])
def pair(request, tmp_path):
    """The two ends of one channel of each kind that goes both ways."""
    if request.param == "fd":
        ours, theirs = (s.detach() for s in socket.socketpair())
        with Listener(FdAddress(theirs)) as listener:
            ends = connect(FdAddress(ours)), listener.accept()
    else:
        address = {
            "tcp": TcpAddress("127.0.0.1", 0),
            "tcp6": TcpAddress("::1", 0),
            "unix": UnixAddress(str(tmp_path / "s")),
        }[request.param]
        with Listener(address) as listener:
            near = connect(listener.addresses[0], timeout_s=10)
            ends = near, listener.accept(10)
    with ends[0], ends[1]:
        yield ends


def test_bytes_go_both_ways_and_are_counted(pair):
    near, far = pair
    assert near.can_return
    assert far.can_return
    near.send(b"hello")
    far.send_many([b"he", bytearray(b"l"), b"", memoryview(b"lo")])
    room = memoryview(bytearray(100))
    for channel in pair:
        assert channel.receive_into(room[:2]) == 2
        assert channel.receive_into(room[2:]) == 3
        assert bytes(room[:5]) == b"hello"
        assert (channel.sent_bytes, channel.received_bytes) == (5, 5)
    near.close()
    assert far.receive_into(room) == 0


def test_many_pieces_arrive_whole_and_in_order(pair):
    near, far = pair
    near.bound_buffers(8192)  # so that the kernel takes only parts of a gathered send
    pieces = [bytes([n % 251]) * (n % 300) for n in range(3000)]
    thread, outcome = in_thread(lambda: (near.send_many(pieces), near.close()))
    assert read_all(far) == b"".join(pieces)
    thread.join(10)
    assert not isinstance(outcome[0], Exception)
    assert near.sent_bytes == far.received_bytes == sum(map(len, pieces))


def test_of_what_has_not_left_the_kernel_holds_half_of_the_bound(pair):
    near, _ = pair
    if not near.description.startswith("tcp"):
        return  # on this machine nothing waits to leave
    near.bound_buffers(1 << 20)
    thread, outcome = in_thread(lambda: near.send(bytes(64 << 20)))
    sizes = []

    def stands_still():
        sizes.append(near.pending_output())
        return sizes[-5:] == sizes[-1:] * 5 and sizes[-1] > 0

    wait_until(stands_still, 10, "the peer's window is full")
    unsent = array.array("i", [0])
    fcntl.ioctl(near.fileno(), SIOCOUTQNSD, unsent)
    assert 0 < unsent[0] <= (1 << 19) + LARGEST_SEGMENT_BYTES
    near.shutdown()
    thread.join(10)
    assert isinstance(outcome[0], ChannelBroken)


def test_what_is_not_taken_is_pending(pair):
    near, far = pair
    if near.description.startswith("tcp"):
        assert near.pending_output() == 0  # the peer's kernel takes it at once
        return
    near.send(b"x" * 1000)
    assert near.pending_output() >= 1000
    far.receive_into(memoryview(bytearray(1000)))
    assert near.pending_output() == 0
    near.close()
    assert near.pending_output() == 0


@pytest.mark.parametrize("how", ["shutdown", "close"])
def test_a_waiting_receive_is_woken(pair, how):
    near, _ = pair
    thread, outcome = in_thread(lambda: near.receive_into(memoryview(bytearray(1))))
    wait_until(lambda: is_inside(thread, "receive_into"), 10, "the thread receives")
    getattr(near, how)()
    thread.join(10)
    assert isinstance(outcome[0], ChannelBroken)
    assert str(outcome[0]) == f"{near.description}: closed on this side"


def test_a_waiting_send_is_woken(pair):
    near, _ = pair
    near.bound_buffers(8192)
    thread, outcome = in_thread(lambda: near.send(bytes(64 << 20)))
    wait_until(lambda: is_inside(thread, "send"), 10, "the thread sends")
    near.shutdown()
    thread.join(10)
    assert isinstance(outcome[0], ChannelBroken)


def test_after_the_end_every_call_says_so(pair):
    near, far = pair
    near.close()
    near.close()
    near.shutdown()
    with pytest.raises(ChannelBroken, match="closed on this side"):
        near.send(b"x")
    with pytest.raises(ChannelBroken, match="closed on this side"):
        near.receive_into(memoryview(bytearray(1)))

    def send_until_refused():
        while True:
            far.send(bytes(65536))

    with pytest.raises(ChannelBroken) as broken:
        send_until_refused()
    assert str(broken.value).startswith(far.description)
    assert "\n" not in str(broken.value)


def test_tcp_is_told_to_notice_a_silent_peer(pair):
    near, _ = pair
    near.watch(8)
    if near.description.startswith("tcp"):
        level = socket.IPPROTO_TCP
        with socket.socket(fileno=os.dup(near.fileno())) as same:
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert same.getsockopt(level, socket.TCP_KEEPIDLE) == 2
            assert same.getsockopt(level, socket.TCP_USER_TIMEOUT) == 8000
            assert same.getsockopt(level, socket.TCP_NODELAY)


def test_reset_by_the_peer_is_broken_with_its_name():
    with Listener(TcpAddress("127.0.0.1", 0)) as listener:
        port = listener.addresses[0].port
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far = listener.accept(10)
        text = r"^tcp:127.0.0.1:[0-9]+: Connection reset by peer$"
        with far, pytest.raises(ChannelBroken, match=text):
            far.receive_into(memoryview(bytearray(1)))


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connecting is refused
        port = taken.getsockname()[1]
        text = f"^Failed to connect to '127.0.0.1:{port}': Connection refused$"
        with pytest.raises(CannotConnect, match=text):
            connect(TcpAddress("127.0.0.1", port))


def test_nobody_there_at_other_addresses(tmp_path):
    path = str(tmp_path / "nobody")
    with pytest.raises(CannotConnect, match=f"'{path}': No such file or directory"):
        connect(UnixAddress(path))
    with pytest.raises(CannotConnect, match=f"Could not open '{path}/x': No such file"):
        connect(FileAddress(path + "/x"))
    with pytest.raises(CannotConnect, match=r"address resolution failed for a..b"):
        connect(TcpAddress("a..b", 1))
    with pytest.raises(CannotConnect, match="Invalid file descriptor 999999: Bad file"):
        connect(FdAddress(999999))
    with pytest.raises(Refused, match="File descriptor named 'mig' has not been found"):
        connect(FdAddress("mig"))


def test_a_file_keeps_what_stands_before_the_offset(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"a" * 100)
    with connect(FileAddress(str(path), 10)) as channel:
        assert not channel.can_return
        assert channel.pending_output() == 0
        channel.bound_buffers(4096)
        channel.watch(1)
        channel.send(b"stream")
        with pytest.raises(ChannelBroken, match="can only be written to"):
            channel.receive_into(memoryview(bytearray(1)))
    assert path.read_bytes() == b"a" * 10 + b"stream"
    with Listener(FileAddress(str(path), 10)) as listener:
        source = listener.accept()
    assert read_all(source) == b"stream"
    with pytest.raises(ChannelBroken, match="can only be read from"):
        source.send(b"x")
    source.close()


def test_a_new_file_is_its_owners_alone(tmp_path):
    path = tmp_path / "f"
    with connect(FileAddress(str(path))) as channel:
        channel.send_many([bytes([n % 256]) for n in range(5000)])
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == bytes(n % 256 for n in range(5000))


def test_a_full_disk_is_broken():
    channel = connect(FileAddress("/dev/full"))
    with pytest.raises(ChannelBroken, match=r"^file:/dev/full: No space left on device$"):
        channel.send(b"x")
    channel.close()


def test_a_pipe_wakes_and_ends_like_a_socket():
    reading, writing = os.pipe()
    with Listener(FdAddress(reading)) as listener:
        near, far = connect(FdAddress(writing)), listener.accept()
    near.send(b"abc")
    assert near.pending_output() == 3
    assert not near.can_return
    room = memoryview(bytearray(3))
    assert far.receive_into(room) == 3
    thread, outcome = in_thread(lambda: far.receive_into(room))
    wait_until(lambda: is_inside(thread, "receive_into"), 10, "the thread receives")
    far.shutdown()
    thread.join(10)
    assert "closed on this side" in str(outcome[0])
    thread, outcome = in_thread(lambda: near.send(bytes(1 << 20)))
    wait_until(lambda: near.pending_output() >= 4096, 10, "the pipe fills")
    near.close()
    thread.join(10)
    assert isinstance(outcome[0], ChannelBroken)
    far.close()


def test_a_command_takes_the_stream_and_answers(tmp_path):
    with connect(ExecAddress("cat")) as channel:
        assert channel.can_return
        channel.send(b"hello")
        room = memoryview(bytearray(5))
        assert channel.receive_into(room) == 5
        assert bytes(room) == b"hello"
    path = tmp_path / "f"
    with connect(ExecAddress(f"cat < /dev/stdin > {path}")) as channel:
        channel.send(bytes(300_000))
    assert path.stat().st_size == 300_000  # close has waited for the command
    with Listener(ExecAddress(f"cat {path}")) as listener, listener.accept() as source:
        assert read_all(source) == bytes(300_000)


def test_a_command_that_fails_is_broken_at_close():
    channel = connect(ExecAddress("cat > /dev/null; exit 3"))
    channel.send(b"x")
    with pytest.raises(
        ChannelBroken, match=r"^exec:cat > /dev/null; exit 3: .* ended with status 3"
    ):
        channel.close()
    channel.close()


def test_a_command_we_stop_listening_to_is_no_failure():
    with Listener(ExecAddress("cat /dev/zero")) as listener, listener.accept() as source:
        assert source.receive_into(memoryview(bytearray(10)))


def is_gone(pid):
    """Whether no process has this number, or only what is left of one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def command_with_children(folder, *, prologue=""):
    """A command that goes on for ever after its input has ended; the processes that it consists of."""
    pids = folder / "pids"
    ran = CommandChannel(
        ExecAddress(
            f"{prologue} sleep 1000 & echo $$ $! > {pids}.new; mv {pids}.new {pids};"
            " cat > /dev/null; wait"
        )
    )
    wait_until(pids.exists, 10, "the command has started")
    return ran, [int(pid) for pid in pids.read_text().split()]


def all_gone(pids):
    wait_until(lambda: all(map(is_gone, pids)), 10, f"{pids} have ended")


def test_a_command_that_does_not_end_is_ended():
    channel = CommandChannel(ExecAddress("exec sleep 1000"), patience_s=0.05)
    with pytest.raises(ChannelBroken, match=r"still running 0.05 s after its input ended"):
        channel.close()
    channel.close()


def test_a_command_that_was_given_up_ends_with_its_children(tmp_path):
    channel, pids = command_with_children(tmp_path)
    channel.shutdown()
    all_gone(pids)
    channel.close()
    channel.shutdown()


@pytest.mark.parametrize("prologue", ["", "trap '' TERM;"], ids=["polite", "stubborn"])
def test_to_close_a_command_can_be_given_up(tmp_path, prologue):
    channel, pids = command_with_children(tmp_path, prologue=prologue)
    channel.send(b"x")
    thread, outcome = in_thread(channel.close)
    wait_until(lambda: is_inside(thread, "close"), 10, "the thread closes")
    assert not any(map(is_gone, pids))
    channel.shutdown()
    thread.join(10)
    all_gone(pids)
    # Given up before it has begun to wait, or while it waits.
    assert outcome[0] is None or str(outcome[0]).endswith(": closed on this side")


def test_a_process_that_ends_takes_its_command_with_it(tmp_path):
    channel, pids = command_with_children(tmp_path, prologue="trap '' TERM;")
    channel.leave()
    all_gone(pids)


def test_how_a_command_ends_is_of_no_account_once_all_is_delivered():
    channel = connect(ExecAddress("cat > /dev/null; exit 3"))
    channel.send(b"x")
    channel.delivered()
    channel.close()


@pytest.mark.parametrize("command", ["exit 3", "kill $$"])
def test_a_command_that_fails_says_so_to_who_reads(command):
    status = {"exit 3": "3", "kill $$": "-15"}[command]
    said = f"exec:{command}: the command ended with status {status}"
    with Listener(ExecAddress(command)) as listener:
        source = listener.accept()
    with pytest.raises(ChannelBroken) as broken:
        source.receive_into(memoryview(bytearray(1)))
    assert str(broken.value) == said
    with pytest.raises(ChannelBroken):
        source.close()


def test_a_command_that_fails_says_so_to_who_writes():
    channel = connect(ExecAddress("exec 0<&-; exit 3"))

    def send_until_refused():
        while True:
            channel.send(bytes(65536))

    with pytest.raises(ChannelBroken, match=r"the command ended with status 3$"):
        send_until_refused()
    channel.shutdown()
    channel.close()


def test_a_command_that_goes_on_behind_its_output_has_ended_the_stream():
    channel = connect(ExecAddress("exec >&-; cat > /dev/null"))
    assert channel.receive_into(memoryview(bytearray(1))) == 0
    channel.close()


def test_a_listening_port_is_taken():
    with Listener(TcpAddress("127.0.0.1", 0)) as listener:
        text = "^Failed to find an available port: Address already in use$"
        with pytest.raises(CannotListen, match=text):
            Listener(listener.addresses[0])
    assert listener.addresses == []


def test_addresses_that_cannot_be_listened_on(tmp_path):
    with pytest.raises(CannotListen, match=r"^Failed to bind socket: Cannot assign requested"):
        Listener(TcpAddress("192.0.2.1", 0))
    with pytest.raises(CannotListen, match="Failed to bind socket to /nowhere/s: No such file"):
        Listener(UnixAddress("/nowhere/s"))
    with pytest.raises(CannotListen, match="Could not open '/nowhere/s': No such file"):
        Listener(FileAddress("/nowhere/s"))
    with pytest.raises(CannotListen, match="Invalid file descriptor 999999"):
        Listener(FdAddress(999999))
    plain = tmp_path / "plain"
    plain.write_text("mine")
    with pytest.raises(CannotListen, match="Address already in use"):
        Listener(UnixAddress(str(plain)))
    assert plain.read_text() == "mine"


def test_a_unix_socket_left_behind_is_no_obstacle_and_closing_removes_only_ours(tmp_path):
    path = tmp_path / "s"
    first = Listener(UnixAddress(str(path)))
    second = Listener(UnixAddress(str(path)))
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


@pytest.mark.parametrize("address", [TcpAddress("", 0), TcpAddress("0", 0)])
def test_any_address_can_be_reached_over_ipv4(address):
    with Listener(address) as listener:
        port = listener.addresses[0].port
        with connect(TcpAddress("127.0.0.1", port)), connect(TcpAddress("", port)):
            for _ in range(2):
                listener.accept(10).close()


def test_a_listening_descriptor_gives_several_channels():
    door = socket.create_server(("127.0.0.1", 0))
    port = door.getsockname()[1]
    with Listener(FdAddress(door.detach())) as listener:
        for _ in range(2):
            with connect(TcpAddress("127.0.0.1", port)) as near, listener.accept(10) as far:
                near.send(b"x")
                assert far.receive_into(memoryview(bytearray(1))) == 1


@pytest.mark.parametrize("kind", ["tcp", "unix", "file"])
def test_a_waiting_accept_is_woken(kind, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    listener = Listener(
        {
            "tcp": TcpAddress("127.0.0.1", 0),
            "unix": UnixAddress(str(tmp_path / "s")),
            "file": FileAddress(str(plain)),
        }[kind]
    )
    if kind == "file":
        listener.accept().close()
    with pytest.raises(TimeoutError, match=r"no peer connected within 0.01 s"):
        listener.accept(0.01)
    thread, outcome = in_thread(listener.accept)
    wait_until(lambda: is_inside(thread, "accept"), 10, "the thread accepts")
    listener.close()
    listener.close()
    thread.join(10)
    assert isinstance(outcome[0], ChannelBroken)
    with pytest.raises(ChannelBroken, match="no longer listened on"):
        listener.accept()
