"""What a source writes on its channels of multifd is what a destination reads."""

import ctypes

import numpy as np
import pytest

from postcopy.stream.layout import BlockLayout
from postcopy.stream.multifd import MultifdDecoder, MultifdInitial, MultifdSync
from postcopy.stream.multifd_encoder import (
    COMPRESSORS,
    encode_initial,
    encode_sync,
    gathered,
    page_headers,
    zero_headers,
)
from postcopy.stream.records import Pages, ZeroPages

PAGE = 4096
ROWS = np.random.default_rng(3).integers(0, 4, (600, PAGE), dtype=np.uint8)
SCATTERED = np.array([3, 4, 5, 9, *range(20, 400), 401, 599])
WHERE = SCATTERED[::-1].astype(np.uint64) * np.uint64(PAGE)


def encoded(compression):
    headers = page_headers("ram", WHERE, compression)
    if compression == "none":
        pieces = gathered(headers, ROWS, SCATTERED).tolist()
        return b"".join(ctypes.string_at(at, length) for at, length in pieces)
    compress, parts = COMPRESSORS[compression](1), []
    for number in range(len(headers)):
        pages = ROWS[SCATTERED[128 * number : 128 * (number + 1)]]
        data = compress(pages.data.cast("B"))
        headers["size"][number] = len(data)
        parts += [headers[number].tobytes(), data]
    return b"".join(parts)


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_round_trip(compression):
    zeros = np.arange(200, dtype=np.uint64) * np.uint64(PAGE)
    decoder = MultifdDecoder(lambda: {"ram": BlockLayout(600 * PAGE)})
    stream = encode_initial(7) + encoded(compression)
    stream += zero_headers("ram", zeros, compression).tobytes() + encode_sync(9)
    memory, zeroed, syncs = np.full((600, PAGE), 255, np.uint8), [], []
    for first in range(0, len(stream), 100_000):
        decoder.feed(stream[first : first + 100_000])
        while (record := decoder.next_record()) is not None:
            match record:
                case Pages():
                    memory[(record.offsets // PAGE).astype(int)] = record.data
                case ZeroPages():
                    zeroed += record.offsets.tolist()
                case MultifdInitial():
                    assert record == MultifdInitial(bytes(16), 7)
                case MultifdSync():
                    syncs.append(record.packet)
    decoder.finish()
    wanted = np.full((600, PAGE), 255, np.uint8)
    wanted[SCATTERED[::-1]] = ROWS[SCATTERED]
    np.testing.assert_array_equal(memory, wanted)
    assert zeroed == zeros.tolist()
    assert syncs == [9]
