"""Mutates images and opens them: run as a process of its own, with little memory.

``python -m image.fuzz_images FOLDER FORM SEED COUNT``; prints how many were refused.
"""

import os
import random
import resource
import sys
from collections import Counter
from pathlib import Path

from image.images import memory, stream_bytes, write_image
from image.test_libvirt import header
from postcopy.errors import ImageError
from postcopy.image.device_fields import device_fields
from postcopy.image.extract import choose_ranges
from postcopy.image.formats import open_image
from postcopy.image.records import read_records

SPARE_BYTES = 256 << 20
EXTREMES = (
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    bytes(8),
    b"\0\0\0\1\0\0\0\0",
    b"\0\x10\0\0\0\0\0\0",
)
READ_PAGES = 64


class Mutator:
    """Changes a file at a few places, and undoes it.

    Most changes hit what is not pages: that is where a file can lie.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self.whole = path.read_bytes()
        self._random = random.Random(seed)
        with open_image(path) as image:
            self._places = [
                at
                for at in range(0, len(self.whole), 8)
                if any(self.whole[at : at + 8]) and image.locate(at, at + 8) is None
            ]
        self._undo: list[tuple[int, int]] = []

    def mutate(self) -> None:
        pick = self._random.random()
        if pick < 0.1:
            os.truncate(self._path, self._random.randrange(len(self.whole)))
            return
        with self._path.open("r+b", buffering=0) as file:
            for _ in range(self._random.choice((1, 1, 1, 2, 5))):
                self._one(file)
            if pick < 0.2:
                file.seek(0, os.SEEK_END)
                file.write(self._random.randbytes(self._random.randrange(1, 40)))

    def _one(self, file) -> None:
        at = self._random.choice(self._places) + self._random.randrange(8)
        if self._random.random() < 0.1:
            at = self._random.randrange(len(self.whole))
        at = min(at, len(self.whole) - 1)
        match self._random.randrange(4):
            case 0:
                new = bytes([self.whole[at] ^ 1 << self._random.randrange(8)])
            case 1:
                new = self._random.randbytes(self._random.randrange(1, 9))
            case 2:
                new = self._random.choice(EXTREMES)[: self._random.choice((1, 2, 4, 8))]
            case _:
                source = self._random.choice(self._places)
                new = self.whole[source : source + self._random.randrange(1, 64)]
        file.seek(at)
        file.write(new)
        self._undo.append((at, len(new)))

    def __enter__(self):
        self._undo.clear()
        return self

    def __exit__(self, *_) -> None:
        with self._path.open("r+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) < len(self.whole):
                file.truncate(len(self.whole))
                self._undo = [(0, len(self.whole))]
            for at, length in self._undo:
                file.seek(at)
                file.write(self.whole[at : at + length])
            file.truncate(len(self.whole))


def read_everything(path: Path) -> None:
    with open_image(path) as image:
        for block in image.blocks:
            has_data = image.has_data(block.name)
            assert len(has_data) == block.pages
            count = min(READ_PAGES, block.pages)
            for first in {0, block.pages - count}:
                assert image.read(block.name, first, count).shape == (count, 4096)
            image.address(block.name)
        image.locate(0, 1 << 40)
        list(image.damages())
        choose_ranges(image, None)
        list(device_fields(image))
    read_records(path, lambda _: None)


def bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(folder: str, form: str, seed: str, count: str) -> None:
    path = Path(folder) / "image"
    if form == "libvirt":
        path.write_bytes(header() + stream_bytes(memory(pages=6, rom_pages=2)))
    else:
        write_image(path, form, memory(pages=6, rom_pages=2))
    read_everything(path)
    mutator = Mutator(path, int(seed))
    bound_memory()
    outcomes: Counter[str] = Counter()
    for number in range(int(count)):
        with mutator:
            mutator.mutate()
            try:
                read_everything(path)
            except ImageError as error:
                outcomes["refused" if str(path) in str(error) else "anonymous"] += 1
            except BaseException as error:
                error.add_note(f"mutation {number} of seed {seed}")
                raise
            else:
                outcomes["read"] += 1
    assert path.read_bytes() == mutator.whole
    assert not outcomes["anonymous"]
    sys.stdout.write(f"{outcomes['refused']} {outcomes['read']}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
