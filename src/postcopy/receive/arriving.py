"""An image that is made of a QEMU's file while the QEMU still writes that.

The QEMU writes a plain stream to a file, and not to this process: a process that is killed must not end a
background snapshot, with which older QEMUs would leave their guest standing.  A thread reads the file as it
grows.  It takes the digests, and writes the pages to their places in a mapped-ram file; when the QEMU has
written the last byte, only the end is left to do.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from postcopy.channel.whole_file import WholeFile
from postcopy.errors import MigrationCancelled, PostcopyError
from postcopy.image.base import LARGEST_RAM_BYTES, ImageBlock
from postcopy.image.digests import CHUNK_BYTES, ChunkDigests, digest, is_zero
from postcopy.image.finalize import NO_TIMES, Prepared
from postcopy.image.manifest import Manifest
from postcopy.image.options import Form
from postcopy.image.parser import formats_of
from postcopy.kernel import threads
from postcopy.receive.page_file import PageFile
from postcopy.stream.precopy_decoder import PrecopyDecoder
from postcopy.stream.records import (
    Configuration,
    Description,
    DeviceSection,
    Pages,
    RamSetup,
    Record,
    XbzrlePage,
    ZeroPages,
)

_POLL_S: Final = 0.005
_TAKERS: Final[dict[type, Callable[[PageFile, Any], None]]] = {
    Pages: PageFile.write,
    ZeroPages: PageFile.clear,
    XbzrlePage: PageFile.change,
}


class ArrivingImage:
    """Makes one image; use it in a ``with``, in which the image is published.

    What cannot be made on the way is made of the whole file, as if there had been no such object: its
    errors say what is wrong.

    :param written: the file that the QEMU writes; it may not exist yet.
    :param path: of the image.
    :param form: of the image.
    """

    def __init__(self, written: Path, path: Path, form: Form) -> None:
        self._written = written
        self._path = path
        self._form = form
        self._complete = threading.Event()
        self._given_up = threading.Event()
        self._read_bytes = 0
        self._prepared: Prepared | None = None
        self._file: WholeFile | None = None
        self._thread = threading.Thread(target=self._run, name="arriving", daemon=True)
        self._is_running = False

    def __enter__(self) -> "ArrivingImage":
        with contextlib.suppress(PostcopyError, OSError):
            if self._form == "mapped-ram":
                # Before the QEMU's file is there: it would be taken for what a killed writer has left.
                self._file = WholeFile(self._path)
            self._is_running = threads.start_if_possible(self._thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def give_up(self) -> None:
        """End the thread, and remove what has not been published.  Any number of times."""
        self._given_up.set()
        if self._is_running:
            self._thread.join()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def finish(self) -> Prepared | None:
        """Wait until all is done of a file that is written no more; ``None``: it has to be done anew."""
        if not self._is_running:
            return None
        self._complete.set()
        self._thread.join()
        try:
            whole = self._written.stat().st_size == self._read_bytes
        except OSError:
            return None
        return self._prepared if whole else None  # nothing may stand behind the end

    def _run(self) -> None:
        try:
            with self._open() as source:
                make = self._as_it_is if self._file is None else self._rewritten
                self._prepared = make(source)
        except (PostcopyError, OSError, MemoryError):
            self._close()  # it takes room, of which there may be too little

    def _open(self) -> IO[bytes]:
        while True:
            try:
                return self._written.open("rb", buffering=0)
            except FileNotFoundError:
                self._wait()

    def _wait(self) -> None:
        """Wait until there may be more.

        :raises MigrationCancelled: the image is not wanted any more.
        """
        self._given_up.wait(_POLL_S)
        if self._given_up.is_set():
            raise MigrationCancelled("the image has been given up")

    def _fill(self, source: IO[bytes], buffer: memoryview) -> int:
        """Read some of what there is, or what comes next; 0: at the end of the file."""
        while True:
            complete = self._complete.is_set()  # before the read: what is read then is all
            count = os.readv(source.fileno(), [buffer])
            self._read_bytes += count
            if count or complete:
                return count
            self._wait()

    # Section: the same file

    def _as_it_is(self, source: IO[bytes]) -> Prepared:
        present, found = [], bytearray()
        while chunk := self._chunk(source):
            present.append(not is_zero(chunk))
            if present[-1]:
                found += digest(chunk)
        mask = np.array(present, np.bool_)
        return Prepared(ChunkDigests.of(self._read_bytes, mask, bytes(found)))

    def _chunk(self, source: IO[bytes]) -> bytes:
        chunk = bytearray(CHUNK_BYTES)
        view, size = memoryview(chunk), 0
        while size < CHUNK_BYTES and (count := self._fill(source, view[size:])):
            size += count
        return bytes(view[:size])

    # Section: a mapped-ram file

    def _rewritten(self, source: IO[bytes]) -> Prepared:
        file = self._file
        assert file is not None
        configuration: Configuration | None = None
        blocks: tuple[ImageBlock, ...] = ()
        pages: PageFile | None = None
        devices: list[DeviceSection] = []
        text = None
        with contextlib.ExitStack() as opened:
            for record in self._records(source):
                match record:
                    case Configuration():
                        configuration = record
                    case RamSetup():
                        assert configuration is not None
                        pages = PageFile(file, configuration, record)
                        opened.callback(pages.close)
                        blocks = tuple(
                            ImageBlock(each.name, each.size_bytes) for each in record.blocks
                        )
                    case DeviceSection():
                        devices.append(record)
                    case Description():
                        text = record.text
                    case Pages() | ZeroPages() | XbzrlePage():
                        assert pages is not None
                        _TAKERS[type(record)](pages, record)
            assert pages is not None
            assert configuration is not None
            written = pages.finish(devices, text)
        manifest = Manifest("mapped-ram", configuration.machine, blocks, written.digests, NO_TIMES)
        return Prepared(written.digests, manifest, file, written.data_bytes)

    def _records(self, source: IO[bytes]) -> Iterator[Record]:
        decoder = PrecopyDecoder(formats_of, LARGEST_RAM_BYTES)
        ended = False
        while True:
            record = decoder.next_record()
            if record is not None:
                yield record
            elif ended:
                break
            elif count := self._fill(source, decoder.buffer()):
                decoder.received(count)
            else:
                ended = True
                decoder.end_input()
        decoder.finish()
