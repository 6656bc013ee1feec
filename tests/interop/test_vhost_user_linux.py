"""``postcopy vhost-user-blk`` under Linux: QEMU's guest, which moves, and user-mode Linux."""

import contextlib
import signal

import pytest

from fakes.vhost_back_end import BackEnd
from fakes.waiting import wait_until
from interop.linux_guest import TIMEOUT_S, LinuxGuest, UserModeLinux, check_disk


def test_user_mode_linux_checks_its_disk(tmp_path, disk):
    """It wants each message acknowledged, and gives an address of all ones for a log."""
    with BackEnd(tmp_path / "side", disk) as back_end:
        with UserModeLinux(tmp_path / "uml", back_end.path) as guest:
            guest.console.wait_writes(100)
            check_disk(disk, guest.stop())
        assert back_end.said == ""


@pytest.mark.qemu
def test_requests_that_are_in_flight_when_a_back_end_ends_are_done_by_the_next(tmp_path, disk):
    """Four at a time: it does them in their order, so the used ring says which are left."""
    folder = tmp_path / "back_end"
    with contextlib.ExitStack() as stack:
        back_end = stack.enter_context(BackEnd(folder, disk))
        guest = LinuxGuest(tmp_path / "qemu", back_end.path, "pc", more=",reconnect-ms=20")
        stack.enter_context(guest)
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            guest.console.wait_writes(20, since=guest.console.writes())
            back_end.end(number)
            back_end = stack.enter_context(BackEnd(folder, disk))
        guest.console.wait_writes(20, since=guest.console.writes())
        check_disk(disk, guest.stop())


@pytest.mark.qemu
def test_a_linux_guest_moves_by_precopy(tmp_path, sides, disk):
    """Buffers that only the device writes arrive as they were last: they are in the back end's log."""
    ours, theirs = sides
    with (
        LinuxGuest(tmp_path / "a", ours.path, "pc") as source,
        LinuxGuest(tmp_path / "b", theirs.path, "pc", incoming=True) as target,
    ):
        source.console.wait_writes(50)
        # Most is sent while the guest runs, since what is missing then takes longer than 0.3 s.
        source("migrate-set-parameters", **{"max-bandwidth": 64 << 20, "downtime-limit": 300})
        source.begin_move(target, tmp_path)
        source.wait_migration("completed")
        target.console.wait_writes(50, since=source.console.writes())
        check_disk(disk, target.stop())
    assert ours.said == theirs.said == ""


@pytest.mark.qemu
@pytest.mark.userfaultfd
def test_a_linux_guest_moves_by_postcopy(tmp_path, sides, disk):
    """Its data was made before it moved, so the back end has to ask for it."""
    ours, theirs = sides
    with (
        LinuxGuest(tmp_path / "a", ours.path, "q35") as source,
        LinuxGuest(tmp_path / "b", theirs.path, "q35", incoming=True) as target,
    ):
        source.console.wait_writes(50)
        bandwidths = {"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 1 << 20}
        source("migrate-set-parameters", **bandwidths)
        source.begin_move(target, tmp_path)
        wait_until(lambda: source.sent() > 1 << 18, TIMEOUT_S, "256 KiB sent")
        source("migrate-start-postcopy")
        wait_until(target.back_end_faults, TIMEOUT_S, "a page that the back end asks for")
        source("migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
        target.console.wait_writes(50, since=source.console.writes())
        source.wait_migration("completed")
        check_disk(disk, target.stop())
    assert ours.said == theirs.said == ""
