"""How fast this host compresses pages as multifd does, and how small they become."""

import os
import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.stream.multifd_encoder import COMPRESSORS
from postcopy.stream.multifd_header import PACKET_PAGES
from postcopy.stream.numbers import TARGET_PAGE_BYTES

_SAMPLE_PAGES: Final = 24 * PACKET_PAGES
_SEED: Final = 17
_WORDS: Final = 400
_LEVEL: Final = 1
_LEAST_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Compression:
    """Of pages with data, half of them like text and half random; those of zeros are told, not sent.

    :ivar name: ``zstd`` or ``zlib``, at level 1.
    :ivar bandwidth: bytes of pages a second, of one channel of multifd with a CPU to itself.
    :ivar cpus: of this host.
    :ivar ratio: bytes of pages for each byte on the wire.
    """

    name: str
    bandwidth: int
    cpus: int
    ratio: float


def sample_pages() -> npt.NDArray[np.uint8]:
    """Pages as guests have them: one of words, one of random bytes, and so on; shape ``(n, 4096)``."""
    random = np.random.default_rng(_SEED)
    pages = random.integers(0, 256, (_SAMPLE_PAGES, TARGET_PAGE_BYTES), np.uint8)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgk", np.uint8)
    words = [random.choice(letters, length).tobytes() for length in random.integers(2, 10, _WORDS)]
    frequent = (random.random(_SAMPLE_PAGES // 2 * 900) ** 3 * _WORDS).astype(int).tolist()
    text = np.frombuffer(b" ".join(words[each] for each in frequent), np.uint8)
    count = _SAMPLE_PAGES // 2 * TARGET_PAGE_BYTES
    pages[::2] = np.resize(text, count).reshape(-1, TARGET_PAGE_BYTES)
    return pages


def measure_compression(name: str) -> Compression:
    """Compress sample pages for a quarter of a second or more, packet by packet."""
    pages = sample_pages()
    packets = [pages[at : at + PACKET_PAGES] for at in range(0, len(pages), PACKET_PAGES)]
    compress = COMPRESSORS[name](_LEVEL)
    plain_bytes = wire_bytes = 0
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < _LEAST_S or plain_bytes < pages.nbytes:
        for packet in packets:
            # Copied first, as a channel does: the guest may write to them.
            wire_bytes += len(compress(packet.copy().data.cast("B")))
            plain_bytes += packet.nbytes
    rate = round(plain_bytes / elapsed)
    return Compression(name, rate, os.cpu_count() or 1, plain_bytes / wire_bytes)
