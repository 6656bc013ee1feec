"""Numbers of open files."""

import os
from pathlib import Path

import pytest

from postcopy.kernel.calls import close_all, open_all


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_all_are_opened_or_none():
    before = open_files()
    fds = open_all(lambda path: os.open(path, os.O_RDONLY), ["/dev/null", "/dev/zero"])
    assert open_files() == before + 2
    close_all(fds)
    with pytest.raises(FileNotFoundError):
        open_all(lambda path: os.open(path, os.O_RDONLY), ["/dev/null", "/dev/zero", "/no/such"])
    assert open_files() == before
