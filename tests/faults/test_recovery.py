"""A link that breaks after the switchover: both sides pause, and go on as often as it takes."""

import socket
import threading

import pytest

from fakes.waiting import wait_until
from faults.fault_channel import BITMAP, PACKAGE_PONG, RECOVERY, RESUME_ACK
from faults.recovering import DEADLINE_S, Recovering, broken_journey
from postcopy.errors import WrongState
from postcopy.status import Status

PAUSED, ACTIVE = Status.POSTCOPY_PAUSED, Status.POSTCOPY_ACTIVE


@pytest.fixture
def broken(journey, tmp_path):
    """A postcopy whose link has just been cut."""
    with Recovering(broken_journey(journey), tmp_path) as recovering:
        channel = recovering.start()
        recovering.until_postcopy()
        channel.break_all()
        recovering.source.wait(PAUSED)
        recovering.destination.wait(PAUSED)
        yield recovering


def arrive(broken):
    broken.hurry()
    broken.source.wait(Status.COMPLETED)
    broken.destination.wait(Status.COMPLETED)
    broken.verify(broken.destination)


def after_the_break(side):
    story = side.story()
    return story[story.index("postcopy-paused") :]


def test_the_statuses_are_qemus(broken):
    broken.resume()
    arrive(broken)
    assert after_the_break(broken.source) == [
        "postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active",
        "completed",
    ]  # fmt: skip
    told = [w for w in after_the_break(broken.destination) if w not in {"STOP", "RESUME"}]
    assert told == ["postcopy-paused", "postcopy-recover", "postcopy-active", "completed"]
    assert broken.source.error is None
    assert broken.destination.error is None


def test_on_purpose_and_over_tcp(broken):
    broken.resume("tcp:127.0.0.1:0")
    for side in (broken.source, broken.destination):
        side.until(ACTIVE)
    for side in (broken.source, broken.destination):
        side.control.pause()
        broken.until_settled()
        assert side.error == "Postcopy migration is paused by the user"
        broken.resume("tcp:127.0.0.1:0")
        broken.source.until(ACTIVE)
        broken.destination.until(ACTIVE)
    arrive(broken)


def test_a_pause_waits_for_the_package_that_is_under_way(journey, tmp_path):
    """Broken at once, it could be lost, and nobody at the source could say who has the guest."""
    with Recovering(broken_journey(journey), tmp_path) as broken:
        channel = broken.channel(broken.destination.listen())
        stalled = channel.stall(PACKAGE_PONG, at=0)
        broken.source.control.migrate(channel.uri)
        broken.switch()
        stalled.wait()
        broken.source.wait(Status.POSTCOPY_DEVICE)
        broken.source.control.pause()
        assert (
            broken.source.control.info().status is Status.POSTCOPY_DEVICE
        )  # asked of the engine, behind the pause
        channel.flow()
        broken.until_settled()
        assert broken.source.error == "Postcopy migration is paused by the user"
        broken.check_running_here_only(broken.destination)
        broken.resume()
        arrive(broken)


@pytest.mark.parametrize("step", RECOVERY, ids=str)
def test_the_recovery_breaks_at_each_step_twice(broken, step):
    for at in (0, None):
        channel = broken.channel(broken.listen_again())
        fault = channel.cut(step, at=at)
        broken.source.control.migrate(channel.uri, resume=True)
        fault.wait()
        broken.until_settled()
        assert broken.source.status is PAUSED, broken.story()
        assert broken.destination.status is PAUSED, broken.story()
    broken.resume()
    arrive(broken)


@pytest.mark.parametrize("step", [BITMAP, RESUME_ACK], ids=str)
def test_a_black_hole_in_the_recovery_is_left_by_migrate_pause(broken, step):
    channel = broken.channel(broken.listen_again())
    fault = channel.black_hole(step, at=0)
    broken.source.control.migrate(channel.uri, resume=True)
    fault.wait()
    broken.source.control.pause()
    broken.destination.control.pause()
    broken.until_settled()
    broken.resume()
    arrive(broken)


def test_wrong_peers_and_then_the_right_ones(broken):
    """QEMU's double failure "handshake"."""
    source_end, source_peer = socket.socketpair()
    destination_end, destination_peer = socket.socketpair()
    with source_peer, destination_peer:
        with source_end, destination_end:
            broken.destination.control.recover(f"fd:{destination_end.fileno()}")
            broken.source.control.migrate(f"fd:{source_end.fileno()}", resume=True)
        destination_peer.send(b"\x08")
        for side in (broken.source, broken.destination):
            side.until(Status.POSTCOPY_RECOVER)
        for side in (broken.source, broken.destination):
            side.control.pause()
            side.until(PAUSED)
    assert "postcopy-recover-setup" in broken.source.story()
    broken.resume()
    arrive(broken)


def test_a_peer_that_is_gone_before_the_resume(broken):
    """QEMU's double failure "reconnect"."""
    source_end, source_peer = socket.socketpair()
    destination_end, destination_peer = socket.socketpair()
    with destination_peer:
        with source_end, destination_end:
            source_peer.close()
            broken.destination.control.recover(f"fd:{destination_end.fileno()}")
            broken.destination.until(Status.POSTCOPY_RECOVER)
            broken.source.control.migrate(f"fd:{source_end.fileno()}", resume=True)
            wait_until(lambda: broken.source.story().count("postcopy-paused") == 2, DEADLINE_S)
        assert "postcopy-recover-setup" in broken.source.story()
        assert broken.destination.status is Status.POSTCOPY_RECOVER
        broken.destination.control.pause()
        broken.destination.until(PAUSED)
    broken.resume()
    arrive(broken)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0", b""])
def test_garbage_pauses_the_destination_again(broken, garbage):
    where = broken.listen_again()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(where.removeprefix("unix:"))
        stranger.sendall(garbage)
        stranger.shutdown(socket.SHUT_WR)
        wait_until(lambda: broken.destination.story().count("postcopy-paused") == 2, DEADLINE_S)
    assert broken.destination.machine.owned
    broken.resume()
    arrive(broken)


def test_garbage_pauses_the_source_again(broken):
    with socket.create_server(("127.0.0.1", 0)) as door:
        uri = f"tcp:127.0.0.1:{door.getsockname()[1]}"
        broken.source.control.migrate(uri, resume=True)
        stranger, _ = door.accept()
        with stranger:
            stranger.sendall(b"\xff" * 64)
            wait_until(lambda: broken.source.story().count("postcopy-paused") == 2, DEADLINE_S)
    assert not broken.source.machine.owned
    broken.resume()
    arrive(broken)


def test_nobody_there(broken):
    broken.source.control.migrate(f"unix:{broken.folder}/nobody", resume=True)
    wait_until(lambda: broken.source.story().count("postcopy-paused") == 2, DEADLINE_S)
    assert "nobody" in broken.source.error
    broken.resume()
    arrive(broken)


@pytest.fixture
def notice_late(monkeypatch):
    """``notice_late(side)``: kill its engine, which is noticed only when somebody has asked it."""

    def kill(side):
        link, asked = side.control._engines.link, threading.Event()
        call, on_end = link.call, link._on_end
        monkeypatch.setattr(link, "_on_end", lambda: (asked.wait(DEADLINE_S), on_end()))

        def call_and_tell(*arguments, **more):
            try:
                return call(*arguments, **more)
            finally:
                asked.set()

        monkeypatch.setattr(link, "call", call_and_tell)
        side.engine.kill()

    return kill


def test_engines_that_have_just_died_are_no_reason_to_refuse(broken, notice_late):
    notice_late(broken.destination)
    notice_late(broken.source)
    assert [side.control.engine_restarts for side in (broken.source, broken.destination)] == [0, 0]
    broken.resume()
    arrive(broken)
    assert [side.control.engine_restarts for side in (broken.source, broken.destination)] == [1, 1]
    assert broken.source.error is None
    with pytest.raises(WrongState):
        broken.source.machine.cont()


def test_the_successor_of_a_dead_engine_can_listen_at_a_descriptor(broken, notice_late):
    notice_late(broken.destination)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        broken.destination.control.recover(f"fd:{ours.fileno()}")
        broken.source.control.migrate(f"fd:{theirs.fileno()}", resume=True)
    arrive(broken)


def test_listening_elsewhere_before_anybody_has_come(broken):
    broken.listen_again(f"unix:{broken.folder}/in-vain")
    broken.resume()
    arrive(broken)


def test_a_second_resume_is_refused(broken):
    channel = broken.resume()
    broken.source.until(ACTIVE)
    with pytest.raises(WrongState, match="Cannot resume if there is no paused migration"):
        broken.source.control.migrate(channel.uri, resume=True)
    with pytest.raises(WrongState, match="can only be run when postcopy is paused"):
        broken.destination.control.recover("tcp:127.0.0.1:0")
    arrive(broken)
