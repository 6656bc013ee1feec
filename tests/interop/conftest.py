"""A disk, and back ends of ``postcopy vhost-user-blk`` for it."""

import pytest

from fakes.vhost_back_end import BackEnd
from interop.disk_guest import DISK_BYTES


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
