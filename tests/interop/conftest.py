"""Guests saved in a QEMU, a disk, and back ends of ``postcopy vhost-user-blk`` for it."""

import pytest

from fakes.qemu_versions import USUAL
from fakes.vhost_back_end import BackEnd
from interop.disk_guest import DISK_BYTES
from interop.saved_in_qemu import SavedInQemu
from interop.saved_linux import SavedLinux


@pytest.fixture
def disk(tmp_path):
    """An empty one."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path


@pytest.fixture
def sides(tmp_path, disk):
    """Two back ends on one file."""
    with BackEnd(tmp_path / "source", disk) as source, BackEnd(tmp_path / "target", disk) as target:
        yield source, target


@pytest.fixture(scope="session")
def saved_linuxes():
    """One of each QEMU that a test has asked for."""
    return {}


@pytest.fixture
def linux(saved_linuxes, qemu_version, tmp_path_factory):
    """A Linux guest that was saved in the QEMU of the test; not to be changed."""
    if qemu_version not in saved_linuxes:
        machine = "q35" if qemu_version == USUAL else "pc"
        saved_linuxes[qemu_version] = SavedLinux(tmp_path_factory.mktemp("linux"), machine)
    return saved_linuxes[qemu_version]


@pytest.fixture(scope="session")
def saved_guests():
    """One of each QEMU that a test has asked for."""
    return {}


@pytest.fixture
def saved(saved_guests, qemu_version, tmp_path_factory):
    """The image of a guest that worked in the QEMU of the test; not to be changed."""
    version = qemu_version or USUAL
    if version not in saved_guests:
        saved_guests[version] = SavedInQemu(tmp_path_factory.mktemp("saved"))
    return saved_guests[version]
