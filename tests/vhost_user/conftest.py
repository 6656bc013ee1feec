"""A back end as a user has it, and a disk whose sectors are told apart."""

import contextlib
import struct

import pytest

from fakes.vhost_back_end import BackEnd, Guest

SECTORS = 4096


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS)))
    return path


@pytest.fixture
def back_end(tmp_path, disk):
    with BackEnd(tmp_path, disk) as made:
        yield made


@pytest.fixture
def connected(back_end):
    """``connected(...)``: one more front end of the back end."""
    with contextlib.ExitStack() as stack:

        def connect(**more):
            made = Guest(back_end.path, **more)
            stack.callback(made.close)
            return made

        yield connect
