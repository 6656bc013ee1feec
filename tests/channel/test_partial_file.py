"""A file has its name only when it is whole."""

import os

import pytest

from postcopy.channel.address import FileAddress, parse
from postcopy.channel.claim import claimed
from postcopy.channel.partial_file import PartialFile, remove_partial
from postcopy.errors import CannotConnect, ChannelBroken, Refused


@pytest.fixture
def address(tmp_path):
    return FileAddress(f"{tmp_path}/image")


def test_written_beside_and_renamed(tmp_path, address):
    (tmp_path / "image").write_text("old")
    made = PartialFile(address)
    partial = made.begin()
    assert partial == FileAddress(f"{tmp_path}/image.partial")
    with (tmp_path / "image.partial").open("w") as file:
        file.write("new")
        file.flush()
        assert (tmp_path / "image").read_text() == "old"
        made.publish(file.fileno())
    made.end()
    assert (tmp_path / "image").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["image"]


def test_what_is_half_written_goes_at_the_end(tmp_path, address):
    made = PartialFile(address)
    made.end()
    made.begin()
    (tmp_path / "image.partial").touch()
    made.end()
    made.end()
    assert not list(tmp_path.iterdir())


def test_what_a_dead_process_has_left_can_be_removed(tmp_path, address):
    remove_partial(address)
    (tmp_path / "image.partial").touch()
    remove_partial(address)
    assert not list(tmp_path.iterdir())


def test_what_another_has_left_is_not_written_into(tmp_path, address):
    (tmp_path / "image.partial").write_text("left")
    made = PartialFile(address)
    made.begin()
    assert not (tmp_path / "image.partial").exists()
    made.end()


def test_what_another_is_writing_stays_as_it_is(tmp_path, address):
    with claimed(address.path):
        (tmp_path / "image.partial").write_text("half")
        second = PartialFile(address)
        with pytest.raises(Refused, match="somebody else is writing"):
            second.begin()
        second.end()
        remove_partial(address)
        assert (tmp_path / "image.partial").read_text() == "half"


@pytest.mark.parametrize("uri", ["tcp:a:1", "unix:/a", "exec:cat", "fd:3", "file:/a,offset=1"])
def test_there_is_nothing_to_rename(uri):
    address = parse(uri)
    made = PartialFile(address)
    assert made.begin() is address
    made.publish(-1)
    made.end()
    remove_partial(address)


def test_a_fifo_is_written_to_directly(tmp_path, address):
    os.mkfifo(tmp_path / "image")
    assert PartialFile(address).begin() is address


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(CannotConnect, match="Is a directory"):
        PartialFile(FileAddress(str(tmp_path))).begin()
    remove_partial(FileAddress(str(tmp_path)))


def test_no_such_folder(tmp_path):
    with pytest.raises(CannotConnect, match=r"Could not open '.*/no/image': No such file"):
        PartialFile(FileAddress(f"{tmp_path}/no/image")).begin()


def test_a_name_that_cannot_be_given(tmp_path, address):
    made = PartialFile(address)
    made.begin()
    with (tmp_path / "image.partial").open("w") as file:
        (tmp_path / "image.partial").unlink()
        with pytest.raises(ChannelBroken, match="No such file"):
            made.publish(file.fileno())
    made.end()
