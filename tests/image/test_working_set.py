"""Working sets on file: what was touched comes back, and nothing else is believed."""

import base64
import json
import os
import stat
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.image import working_set
from postcopy.image.working_set import BadWorkingSet, WorkingSet

BLOCKS = {"microvm.ram": 1000, "rom": 3}
IMAGE = "ab" * 32


def touched(*pages, identity=IMAGE):
    masks = {name: np.zeros(count, np.bool_) for name, count in BLOCKS.items()}
    masks["microvm.ram"][list(pages)] = True
    return WorkingSet(identity, masks)


def load(path):
    return working_set.load(path, IMAGE, BLOCKS)


def test_what_is_saved_is_read(tmp_path):
    path = tmp_path / "image.working-set"
    touched(0, 7, 8, 999).save(path)
    found = load(path)
    assert np.flatnonzero(found.pages["microvm.ram"]).tolist() == [0, 7, 8, 999]
    assert not found.pages["rom"].any()
    assert found.count == 4
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_without_a_file_there_is_none(tmp_path):
    assert load(tmp_path / "none") is None


def test_restores_add_up(tmp_path):
    path = tmp_path / "set"
    working_set.record(path, touched(1, 2))
    whole = working_set.record(path, touched(2, 3))
    assert np.flatnonzero(whole.pages["microvm.ram"]).tolist() == [1, 2, 3]
    assert load(path).restores == 2


def test_one_of_another_image_is_replaced(tmp_path):
    path = tmp_path / "set"
    touched(5, identity="cd" * 32).save(path)
    with pytest.raises(BadWorkingSet, match=r"set belongs to another image; record it again"):
        load(path)
    assert working_set.record(path, touched(6)).restores == 1
    assert load(path).count == 1


def test_no_more_memory_is_taken_than_the_file_has(tmp_path):
    touched(1).save(tmp_path / "set")
    tracemalloc.start()
    try:
        load(tmp_path / "set")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_two_images_do_not_unite():
    with pytest.raises(BadWorkingSet, match="different images"):
        touched(1).united(touched(1, identity="cd" * 32))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"blocks": {}}, "other blocks"),
        ({"blocks": []}, "no working set"),
        ({"restores": "x"}, "no working set"),
        ({"restores": float("inf")}, "no working set"),
        ({"image": 5}, "another image"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, change, why):
    path = tmp_path / "set"
    touched(1).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadWorkingSet, match=why):
        load(path)


def test_nobody_waits_for_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "set")
    told = []
    thread = threading.Thread(target=lambda: told.append(_refusal(tmp_path / "set")), daemon=True)
    thread.start()
    thread.join(10)
    assert told
    assert "not a regular file" in told[0]


def _refusal(path):
    with pytest.raises(BadWorkingSet) as refused:
        load(path)
    return str(refused.value)


@pytest.mark.parametrize(
    "bitmap",
    [
        "no base64 at all!",
        base64.b64encode(b"no deflate").decode(),
        base64.b64encode(zlib.compress(bytes(124))).decode(),
        base64.b64encode(zlib.compress(bytes(126))).decode(),
        base64.b64encode(zlib.compress(bytes(1 << 26))).decode(),
    ],
    ids=["base64", "deflate", "short", "long", "bomb"],
)
def test_a_bitmap_is_of_one_size_whatever_it_unpacks_to(tmp_path, bitmap):
    path = tmp_path / "set"
    touched(1).save(path)
    found = json.loads(path.read_text())
    found["blocks"]["microvm.ram"]["bitmap"] = bitmap
    path.write_text(json.dumps(found))
    with pytest.raises(BadWorkingSet):
        load(path)


@given(st.data())
def test_no_bytes_crash_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("sets") / "set"
    touched(1, 500).save(path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        found = load(path)
    except BadWorkingSet:
        return
    assert {name: len(mask) for name, mask in found.pages.items()} == BLOCKS


def test_an_image_is_known_by_what_it_holds(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"Q" * 200_000)
    before = working_set.identity_of(image)
    copy = tmp_path / "copy"
    copy.write_bytes(image.read_bytes())
    assert working_set.identity_of(copy) == before
    for change in (b"q" + b"Q" * 199_999, b"Q" * 199_999 + b"q", b"Q" * 199_999, b""):
        copy.write_bytes(change)
        assert working_set.identity_of(copy) != before
