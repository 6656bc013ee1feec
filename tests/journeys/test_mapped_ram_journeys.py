"""A guest in a file in which each page has its place: saved stopped or running, and loaded again."""

import contextlib
import os
import signal
import subprocess

import numpy as np
import pytest

from fakes.page_cache import cached, need_disk
from fakes.pair import NEVER_ENDS, QUICK, hammer, idle, tiny
from postcopy.errors import Refused
from postcopy.machine.workload import PAGE_BYTES
from postcopy.parameters import Capability
from postcopy.status import Status
from postcopy.stream.mapped_ram import PAGES_ALIGNMENT_BYTES

MAPPED = (Capability.MAPPED_RAM,)
MIB = 1 << 20


def save(trip, path, **offset):
    uri = f"file:{path}" + "".join(f",offset={value}" for value in offset.values())
    trip.source.control.migrate(uri)
    trip.source.wait(Status.COMPLETED)
    return uri


def load(trip, uri):
    trip.destination.listen(uri)
    trip.finish()


@pytest.mark.parametrize(
    "workload",
    [idle(), hammer(fill_kib=128), hammer(), hammer(vcpus=4), hammer(1024)],
    ids=["idle", "small", "64M", "4 vCPUs", "1G"],
)
def test_a_running_guest(journey, tmp_path, workload):
    trip = journey(workload, capabilities=MAPPED)
    load(trip, save(trip, tmp_path / "saved"))


@pytest.mark.parametrize("workload", [idle(), hammer()], ids=["idle", "hammer"])
def test_a_stopped_guest_to_the_last_byte(journey, tmp_path, workload):
    trip = journey(workload, capabilities=MAPPED, paused=True)
    load(trip, save(trip, tmp_path / "saved"))
    assert (trip.destination.ram() == trip.source.ram()).all()
    assert not trip.destination.machine.running


def test_the_file_is_sparse_and_pages_are_where_they_should_be(journey, tmp_path):
    trip = journey(hammer(256), capabilities=MAPPED, paused=True)
    path = tmp_path / "saved"
    save(trip, path)
    told = path.stat()
    assert told.st_mode & 0o777 == 0o600
    assert told.st_size > 256 * MIB
    assert told.st_blocks * 512 < 16 * MIB
    memory = trip.source.ram()
    in_file = np.memmap(path, np.uint8, "r", PAGES_ALIGNMENT_BYTES, memory.shape)
    assert (in_file == memory).all()
    ram = trip.source.control.info().ram
    assert ram.normal == int(memory.any(axis=1).sum())
    assert ram.normal + ram.duplicate == len(memory)
    assert ram.transferred < ram.normal_bytes + MIB


@pytest.mark.parametrize("more", [(), (Capability.MULTIFD,)], ids=["one thread", "multifd"])
def test_over_many_rounds_no_write_is_lost(journey, tmp_path, more):
    trip = journey(hammer(vcpus=2), capabilities=(*MAPPED, *more), parameters=NEVER_ENDS)
    uri = f"file:{tmp_path}/saved"
    trip.source.control.migrate(uri)
    trip.source.wait_rounds(3)
    trip.source.set(parameters=QUICK)
    trip.source.wait(Status.COMPLETED)
    assert bool(trip.source.control.info().ram.multifd_bytes) == bool(more)
    load(trip, uri)


def test_compression_is_refused_in_qemus_words(journey, tmp_path):
    trip = journey(idle(), capabilities=(*MAPPED, Capability.MULTIFD))
    trip.source.set(parameters={"multifd-compression": "zlib"})
    with pytest.raises(Refused, match=r"^Cannot use compression with mapped-ram$"):
        trip.source.control.migrate(f"file:{tmp_path}/saved")
    assert not (tmp_path / "saved").exists()


DIRECT = {"direct-io": True}
TOGETHER = (*MAPPED, Capability.MULTIFD)


def forget(path):
    """Have the kernel keep nothing of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "through the page cache"])
def test_with_direct_io_the_kernel_keeps_nothing_of_the_pages(journey, tmp_path, direct):
    need_disk(tmp_path)
    trip = journey(hammer(256, fill_kib=64 << 10), capabilities=TOGETHER, paused=True)
    parameters = DIRECT if direct else {}
    trip.source.set(parameters=parameters)
    trip.destination.set(parameters=parameters)
    path = tmp_path / "saved"
    uri = save(trip, path)
    # The kernel reads ahead of the head of the file, as its disk is set: seldom more than 8 MiB.
    pages = slice(32 * MIB // PAGE_BYTES, 256 * MIB // PAGE_BYTES)
    assert cached(path)[pages].any() != direct
    forget(path)
    assert not cached(path)[pages].any()
    load(trip, uri)
    assert cached(path)[pages].any() != direct
    assert (trip.destination.ram() == trip.source.ram()).all()


def test_direct_io_over_many_rounds(journey, tmp_path):
    trip = journey(hammer(vcpus=2), capabilities=TOGETHER, parameters=NEVER_ENDS | DIRECT)
    trip.source.control.migrate(f"file:{tmp_path}/saved,offset=4660")
    trip.source.wait_rounds(3)
    trip.source.set(parameters=QUICK)
    trip.source.wait(Status.COMPLETED)
    trip.destination.set(parameters=DIRECT)
    load(trip, f"file:{tmp_path}/saved,offset=4660")


def test_direct_io_with_one_thread_is_as_without(journey, tmp_path):
    """As in QEMU, whose main channel alone writes what has no alignment."""
    need_disk(tmp_path)
    trip = journey(hammer(), capabilities=MAPPED, paused=True)
    trip.source.set(parameters=DIRECT)
    load(trip, save(trip, tmp_path / "saved"))
    assert cached(tmp_path / "saved")[PAGES_ALIGNMENT_BYTES // PAGE_BYTES :].any()


def test_direct_io_where_there_is_none(journey, tmp_path, without_direct_io):
    trip = journey(hammer(), capabilities=TOGETHER)
    trip.source.set(parameters=DIRECT)
    path = without_direct_io / "saved"
    trip.source.control.migrate(f"file:{path}")
    trip.source.wait(Status.FAILED)
    says = (
        f"file:{path}: filesystem does not support O_DIRECT; switch direct-io off, or give a file on "
        "another file system"
    )
    assert trip.source.error == says
    trip.verify_source()
    trip.source.set(parameters={"direct-io": False})
    uri = save(trip, path)
    trip.destination.set(parameters=DIRECT)
    refused(trip, uri, says)
    load(trip, uri)


def test_behind_an_offset(journey, tmp_path):
    trip = journey(hammer(), capabilities=MAPPED)
    path = tmp_path / "saved"
    path.write_bytes(b"X" * 8192)
    uri = save(trip, path, offset=0x1234)
    assert path.read_bytes()[: 0x1234 + 4] == b"X" * 0x1234 + b"QEVM"
    load(trip, uri)


def test_an_older_file_is_written_over_whole(journey, tmp_path):
    """What it held must not shine through where pages are zero now."""
    path = tmp_path / "saved"
    path.write_bytes(b"\xff" * 80 * MIB)
    trip = journey(hammer(), capabilities=MAPPED, paused=True)
    load(trip, save(trip, path))
    assert (trip.destination.ram() == trip.source.ram()).all()


def test_loaded_twice_and_saved_again(journey, tmp_path):
    trip = journey(hammer(), capabilities=MAPPED, paused=True)
    uri = save(trip, tmp_path / "saved")
    load(trip, uri)
    trip.new_destination()
    load(trip, uri)
    trip.turn()
    load(trip, save(trip, tmp_path / "again"))


@pytest.mark.parametrize(
    "accelerators", [("unicorn", "unicorn"), ("kvm", "unicorn"), ("unicorn", "kvm")], ids="-".join
)
def test_between_accelerators(journey, tmp_path, accelerators):
    trip = journey(tiny("unicorn"), accelerators, capabilities=MAPPED)
    load(trip, save(trip, tmp_path / "saved"))


def test_events(journey, tmp_path):
    trip = journey(hammer(), capabilities=MAPPED)
    load(trip, save(trip, tmp_path / "saved"))
    words = [word for word in trip.source.story() if not word.startswith("PASS")]
    assert words == ["RESUME", "setup", "active", "STOP", "device", "completed"]
    assert trip.destination.story()[:4] == ["setup", "active", "RESUME", "completed"]


# --- what cannot work


def test_only_a_file_will_do(journey, tmp_path):
    trip = journey(hammer(), capabilities=MAPPED)
    for uri in ("tcp:127.0.0.1:0", f"unix:{tmp_path}/socket", "exec:cat > /dev/null"):
        for order in (trip.source.control.migrate, trip.destination.control.incoming):
            with pytest.raises(
                Refused, match=r"^Migration requires seekable transport \(e\.g\. file\)$"
            ):
                order(uri)
    assert trip.source.status is Status.NONE
    load(trip, save(trip, tmp_path / "saved"))


def test_not_into_a_pipe(journey, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    trip = journey(hammer(), capabilities=MAPPED)
    trip.source.control.migrate(f"file:{fifo}")
    trip.source.wait(Status.FAILED)
    os.close(reader)
    says = f"mapped-ram needs a file in which pages have places, which file:{fifo} is not"
    assert trip.source.error == says
    writer = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    refused(trip, f"file:{fifo}", says)
    os.close(writer)
    trip.verify_source()


def refused(trip, uri, says):
    trip.destination.listen(uri)
    trip.destination.wait(Status.FAILED)
    assert says in trip.destination.error
    assert "\n" not in trip.destination.error
    assert not trip.destination.machine.running
    trip.new_destination()


def test_on_here_and_off_there(journey, tmp_path):
    trip = journey(hammer(), capabilities=MAPPED, paused=True)
    uri = save(trip, tmp_path / "saved")
    trip.destination.control.set_capabilities({Capability.MAPPED_RAM: False})
    refused(trip, uri, "Capability mapped-ram is off, but received capability is on")
    load(trip, uri)


def test_off_here_and_on_there(journey, tmp_path):
    trip = journey(hammer(), paused=True)
    uri = save(trip, tmp_path / "saved")
    trip.destination.set(MAPPED)
    refused(trip, uri, "Capability mapped-ram is on, but received capability is off")
    load(trip, uri)


def test_damaged_files(journey, tmp_path):
    """Each damage is named, with its place; and the file as it was loads."""
    trip = journey(hammer(), capabilities=MAPPED, paused=True)
    path = tmp_path / "saved"
    uri = save(trip, path)
    good = path.read_bytes()
    name = good.index(b"microvm.ram")
    header = name + len("microvm.ram") + 8
    bitmap_offset = int.from_bytes(good[header + 12 : header + 20], "big")
    end = PAGES_ALIGNMENT_BYTES + 64 * MIB
    damages = {
        "Not a migration stream": (0, b"q"),
        "Unsupported migration stream version": (7, b"\x04"),
        "Unknown ramblock": (name, b"M"),
        "Size mismatch: microvm.ram": (header - 5, b"\x08"),
        "microvm.ram: mapped-ram header of version 129": (header + 3, b"\x81"),
        "microvm.ram: pages of 1052672 bytes": (header + 9, b"\x10"),
        "microvm.ram: its bitmap at 0x0 would overlap its header": (header + 12, bytes(8)),
        "microvm.ram: its pages at 0x0 would overlap its bitmap": (header + 20, bytes(8)),
        "microvm.ram: its pages at 0x100001 are not aligned": (header + 27, b"\x01"),
        "beyond the file of": (header + 22, b"\x01"),
        "Unknown combination of migration flags": (end + 7, b"\x11"),
        "Missing section footer for ram": (end + 8, b"\x7f"),
    }
    for says, (offset, data) in damages.items():
        damaged = bytearray(good)
        damaged[offset : offset + len(data)] = data
        path.write_bytes(damaged)
        refused(trip, uri, says)
    assert bitmap_offset == header + 28
    path.write_bytes(good)
    load(trip, uri)


@pytest.mark.parametrize("kept", [0, 5, 60, 4096, 40 * MIB, 65 * MIB + 10, -1], ids=str)
def test_cut_files(journey, tmp_path, kept):
    trip = journey(hammer(), capabilities=MAPPED, paused=True)
    path = tmp_path / "saved"
    uri = save(trip, path)
    length = path.stat().st_size
    # Without its description a stream is whole.
    whole = path.read_bytes().rindex(b'{"configuration"') - 5
    os.truncate(path, kept if kept >= 0 else whole - 1)
    refused(trip, uri, "beyond the file of" if kept in {4096, 40 * MIB} else "The stream ends in")
    assert length > whole


def test_one_that_failed_leaves_nothing_behind(journey, tmp_path):
    """Pages of a file that proved bad do not shine through where the next one has none."""
    trip = journey(hammer(), capabilities=MAPPED, paused=True)
    good, bad = tmp_path / "good", tmp_path / "bad"
    uri = save(trip, good)
    raw = bytearray(good.read_bytes())
    bitmap = raw.index(b"microvm.ram") + len("microvm.ram") + 8 + 28
    first = 48 * MIB
    assert not raw[bitmap + first // PAGE_BYTES // 8]
    raw[bitmap + first // PAGE_BYTES // 8] = 0xFF
    place = PAGES_ALIGNMENT_BYTES + first
    raw[place : place + 8 * PAGE_BYTES] = b"\xff" * 8 * PAGE_BYTES
    bad.write_bytes(raw[: PAGES_ALIGNMENT_BYTES + 64 * MIB + 100])
    trip.destination.control.incoming(f"file:{bad}", exit_on_error=False)
    trip.destination.wait(Status.FAILED)
    assert trip.destination.ram()[first // PAGE_BYTES : first // PAGE_BYTES + 8].all()
    trip.destination.control.incoming(uri, exit_on_error=False)
    trip.finish()
    assert (trip.destination.ram() == trip.source.ram()).all()


@contextlib.contextmanager
def file_system(folder, kind, *options):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", kind, *options, "none", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip(f"needs to mount a {kind}: run as root with CAP_SYS_ADMIN")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a few MiB."""
    with file_system(tmp_path / "disk", "tmpfs", "-o", "size=4m") as folder:
        yield folder


@pytest.fixture
def without_direct_io(tmp_path):
    """A file system that knows no ``O_DIRECT``."""
    with file_system(tmp_path / "disk", "ramfs") as folder:
        yield folder


@pytest.mark.parametrize("paused", [False, True], ids=["running", "stopped"])
def test_a_full_disk_leaves_the_guest_here(journey, tmp_path, small_disk, paused):
    trip = journey(hammer(), capabilities=MAPPED, paused=paused)
    trip.source.control.migrate(f"file:{small_disk}/saved")
    trip.source.wait(Status.FAILED)
    assert trip.source.error == f"file:{small_disk}/saved: No space left on device"
    trip.verify_source()
    load(trip, save(trip, tmp_path / "saved"))


def test_cancelled_half_way(journey, tmp_path):
    trip = journey(hammer(), capabilities=MAPPED, parameters=NEVER_ENDS)
    trip.source.control.migrate(f"file:{tmp_path}/saved")
    trip.source.wait_rounds(1)
    trip.source.control.cancel()
    trip.source.wait(Status.CANCELLED)
    trip.verify_source()
    trip.source.set(parameters=QUICK)
    load(trip, save(trip, tmp_path / "saved"))


def test_an_engine_that_dies_half_way(journey, tmp_path):
    trip = journey(hammer(), capabilities=MAPPED, parameters=NEVER_ENDS)
    uri = f"file:{tmp_path}/saved"
    trip.source.control.migrate(uri)
    trip.source.wait_rounds(1)
    os.kill(trip.source.engine_process_id(), signal.SIGKILL)
    trip.source.wait(Status.FAILED)
    assert "the engine process died; start the migration again" in trip.source.error
    refused(trip, uri, "The stream ends in an element")
    trip.verify_source()
    trip.source.set(parameters=QUICK)
    load(trip, save(trip, tmp_path / "saved"))
