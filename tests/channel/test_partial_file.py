"""A file has its name only when it is whole."""

import os
from pathlib import Path

import pytest

from postcopy.channel.address import FileAddress, parse
from postcopy.channel.partial_file import PartialFile, remove_partial
from postcopy.channel.path_lock import path_locked
from postcopy.channel.whole_file import is_partial, partial_name
from postcopy.errors import CannotConnect, ChannelBroken, Refused


@pytest.fixture
def address(tmp_path):
    return FileAddress(f"{tmp_path}/image")


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_written_beside_and_renamed(tmp_path, address):
    (tmp_path / "image").write_text("old")
    made = PartialFile(address)
    partial = Path(made.begin().path)
    assert made.ordinary
    assert is_partial(partial)
    assert partial.parent == tmp_path
    with partial.open("w") as file:
        file.write("new")
        file.flush()
        made.sync(file.fileno())
    assert (tmp_path / "image").read_text() == "old"
    made.publish()
    made.end()
    assert (tmp_path / "image").read_text() == "new"
    assert names_in(tmp_path) == ["image"]


def test_what_a_client_publishes_itself_is_written_in_its_place(tmp_path):
    written = partial_name(tmp_path / "image")
    made = PartialFile(FileAddress(str(written)))
    assert made.begin() == FileAddress(str(written))
    assert made.ordinary
    written.write_text("new")
    made.publish()
    made.end()
    assert names_in(tmp_path) == [written.name]
    made.begin()
    made.end()
    assert names_in(tmp_path) == []


def test_what_is_half_written_goes_at_the_end(tmp_path, address):
    made = PartialFile(address)
    made.end()
    Path(made.begin().path).touch()
    made.end()
    made.end()
    assert not names_in(tmp_path)


def test_what_a_dead_process_has_left_can_be_removed(tmp_path, address):
    remove_partial(address)
    left = partial_name(tmp_path / "image")
    for uri in (address, FileAddress(str(left))):
        left.touch()
        remove_partial(uri)
        assert not names_in(tmp_path)


def test_what_another_has_left_goes_when_the_next_begins(tmp_path, address):
    partial_name(tmp_path / "image").touch()
    made = PartialFile(address)
    made.begin()
    made.end()
    assert not names_in(tmp_path)


def test_what_another_is_writing_stays_as_it_is(tmp_path, address):
    half = partial_name(tmp_path / "image")
    with path_locked(address.path):
        half.write_text("half")
        second = PartialFile(address)
        with pytest.raises(Refused, match="another process is writing"):
            second.begin()
        second.end()
        remove_partial(address)
        assert half.read_text() == "half"


@pytest.mark.parametrize("uri", ["tcp:a:1", "unix:/a", "exec:cat", "fd:3", "file:/a,offset=1"])
def test_there_is_nothing_to_rename(uri):
    address = parse(uri)
    made = PartialFile(address)
    assert made.begin() is address
    assert not made.ordinary
    made.sync(-1)
    made.publish()
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


def test_a_name_that_cannot_be_given(address):
    made = PartialFile(address)
    made.begin()
    with pytest.raises(ChannelBroken, match=f"{address}: No such file"):
        made.publish()
    made.end()


def test_what_is_no_file_is_not_replaced(tmp_path, address):
    link = tmp_path / "image"
    link.symlink_to("nothing")
    with pytest.raises(Refused, match="image is a symbolic link; remove it"):
        PartialFile(address).begin()
    link.unlink()
    made = PartialFile(address)
    Path(made.begin().path).touch()
    link.symlink_to("nothing")  # meanwhile
    with pytest.raises(Refused, match="image is a symbolic link; remove it"):
        made.publish()
    made.end()
    assert link.is_symlink()
    assert names_in(tmp_path) == ["image"]
