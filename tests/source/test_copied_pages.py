"""Pages that were copied aside before they are sent: what a snapshot puts on the wire."""

import numpy as np

from postcopy.source.wire_sink import BATCH_PAGES, PageRecords
from postcopy.stream.numbers import RamFlag


def records_of(encoded):
    """The parts of one go, parsed: (offset, flag, the page or None)."""
    data = b"".join(bytes(part) for part in encoded.parts)
    found, at = [], 0
    while at < len(data):
        word = int.from_bytes(data[at : at + 8], "big")
        at += 8
        offset, flags = word & ~0xFFF, word & 0xFFF
        if not flags & RamFlag.CONTINUE:
            at += 1 + data[at]
        if flags & RamFlag.PAGE:
            found.append((offset, data[at : at + 4096]))
            at += 4096
        else:
            at += 1
            found.append((offset, None))
    return found


def test_copies_are_sent_from_where_they_were_copied_to():
    contents = np.arange(4 * 512, dtype=np.uint64).reshape(4, 512) + 1
    target = np.array([7, 8, 100, 3])
    (encoded,) = PageRecords().encode_copies("ram", target, contents.view(np.uint8))
    assert (encoded.normal_pages, encoded.zero_pages) == (4, 0)
    assert records_of(encoded) == [
        (int(page) * 4096, row.tobytes()) for page, row in zip(target, contents, strict=True)
    ]


def test_copies_that_are_zero_take_no_room():
    contents = np.zeros((3, 4096), np.uint8)
    contents[1, 4095] = 9
    (encoded,) = PageRecords().encode_copies("ram", np.array([1, 2, 3]), contents)
    assert (encoded.normal_pages, encoded.zero_pages) == (1, 2)
    found = dict(records_of(encoded))
    assert found == {4096: None, 8192: contents[1].tobytes(), 12288: None}


def test_many_copies_go_in_several_goes():
    count = BATCH_PAGES + 1
    contents = np.ones((count, 4096), np.uint8)
    records = PageRecords()
    found = [
        offset
        for encoded in records.encode_copies("ram", np.arange(count), contents)
        for offset, _ in records_of(encoded)
    ]
    assert found == [page * 4096 for page in range(count)]


def test_known_zeros():
    encoded = PageRecords().encode_zeros("ram", np.arange(5, 2000))
    assert (encoded.normal_pages, encoded.zero_pages) == (0, 1995)
    assert records_of(encoded)[0] == (5 * 4096, None)
    assert len(records_of(encoded)) == 1995
