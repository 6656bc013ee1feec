"""An image that is made while its file is written: the same as one that is made of the whole file."""

import numpy as np
import pytest

from fakes.precopy import DESCRIPTION, RAM, STATE, precopy
from postcopy.image.finalize import finalize
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest
from postcopy.image.options import ImageOptions, SnapshotTimings
from postcopy.image.verify import find_damages
from postcopy.receive.arriving import ArrivingImage

FORMS = ["mapped-ram", "stream"]


def arrive(path, written, pieces, form):
    """What is prepared of a file that is written in pieces, and the image that is made of it."""
    with ArrivingImage(written, path, form) as arriving:
        arriving.begin()
        with written.open("wb", buffering=0) as file:
            for piece in pieces:
                file.write(piece)
        prepared = arriving.finish()
        made = finalize(path, written, ImageOptions(form), SnapshotTimings(0.0), prepared=prepared)
    return prepared, made


def cut(raw, step):
    return [raw[at : at + step] for at in range(0, len(raw), step)]


@pytest.mark.parametrize("step", [1000, 70_000, 1 << 22])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_as_if_made_of_the_whole_file(tmp_path, form, step):
    prepared, made = arrive(tmp_path / "image", tmp_path / "written", cut(precopy(), step), form)
    assert prepared is not None
    (tmp_path / "again").write_bytes(precopy())
    whole = finalize(
        tmp_path / "other", tmp_path / "again", ImageOptions(form), SnapshotTimings(0.0)
    )
    assert made.manifest.identity == whole.manifest.identity
    assert (made.ram_bytes, made.data_bytes, made.zero_bytes) == (RAM.size, RAM.size, 0)
    assert (tmp_path / "image").read_bytes() == (tmp_path / "other").read_bytes()
    assert list(find_damages(tmp_path / "image", Manifest.load(tmp_path / "image"))) == []
    with open_image(tmp_path / "image") as image:
        np.testing.assert_array_equal(image.read("microvm.ram", 0, len(RAM)), RAM)
        assert image.format == form
        assert (image.description, image.sections[0].payload) == (DESCRIPTION, STATE)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_made_on_the_way_is_told_by_the_whole_file(tmp_path, form):
    raw = precopy()
    for wrong in (raw[:-1], raw[: len(raw) // 2], raw + b"x", b"nothing", b""):
        written = tmp_path / "written"
        with ArrivingImage(written, tmp_path / "image", form) as arriving:
            arriving.begin()
            written.write_bytes(wrong)
            prepared = arriving.finish()
        assert prepared is None or prepared.manifest is None
        assert [each.name for each in tmp_path.iterdir()] == ["written"]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_of_one_that_is_given_up(tmp_path, form):
    for raw in (None, precopy()[:5000]):
        with ArrivingImage(tmp_path / "written", tmp_path / "image", form) as arriving:
            arriving.begin()
            if raw is not None:
                (tmp_path / "written").write_bytes(raw)
    assert [each.name for each in tmp_path.iterdir()] == ["written"]


def test_without_room_for_a_second_file_it_is_made_of_the_whole_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("postcopy.receive.arriving.WholeFile", full)
    prepared, made = arrive(tmp_path / "image", tmp_path / "written", [precopy()], "mapped-ram")
    assert prepared is None
    assert made.manifest.form == "mapped-ram"
    assert list(find_damages(tmp_path / "image", Manifest.load(tmp_path / "image"))) == []
