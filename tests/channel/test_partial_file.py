"""A file has its name only when it is whole."""

import os

import pytest

from postcopy.channel.address import FileAddress, parse
from postcopy.channel.partial_file import begin_partial, partial_of, publish, remove_partial
from postcopy.errors import CannotConnect, ChannelBroken


@pytest.fixture
def address(tmp_path):
    return FileAddress(f"{tmp_path}/image")


def test_written_beside_and_renamed(tmp_path, address):
    (tmp_path / "image").write_text("old")
    partial = begin_partial(address)
    assert partial == FileAddress(f"{tmp_path}/image.partial")
    with (tmp_path / "image.partial").open("w") as file:
        file.write("new")
        file.flush()
        assert (tmp_path / "image").read_text() == "old"
        publish(address, file.fileno())
    assert (tmp_path / "image").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["image"]


def test_what_is_half_written_can_be_removed(tmp_path, address):
    remove_partial(address)
    (tmp_path / "image.partial").touch()
    remove_partial(address)
    assert not list(tmp_path.iterdir())


def test_what_another_has_left_is_not_written_into(tmp_path, address):
    (tmp_path / "image.partial").write_text("left")
    begin_partial(address)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("uri", ["tcp:a:1", "unix:/a", "exec:cat", "fd:3", "file:/a,offset=1"])
def test_there_is_nothing_to_rename(uri):
    address = parse(uri)
    assert partial_of(address) is None
    assert begin_partial(address) is address
    remove_partial(address)
    publish(address, -1)


def test_a_fifo_is_written_to_directly(tmp_path, address):
    os.mkfifo(tmp_path / "image")
    assert partial_of(address) is None
    assert begin_partial(address) is address


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(CannotConnect, match="Is a directory"):
        begin_partial(FileAddress(str(tmp_path)))


def test_a_name_that_cannot_be_given(tmp_path, address):
    with (tmp_path / "image.partial").open("w") as file:
        (tmp_path / "image.partial").unlink()
        with pytest.raises(ChannelBroken, match="No such file"):
            publish(address, file.fileno())
