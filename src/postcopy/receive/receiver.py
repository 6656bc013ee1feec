"""Receives one precopy of a stock QEMU, or of our machine, as an image.

The thread that calls :meth:`Receiver.run` reads the main channel; each channel of multifd has a thread
of its own.  All of them write pages into one :class:`PageFile`.  The image gets its name when it is whole
and on the disk, and only then is the source told so: it has completed its migration when the image is safe.
"""

import select
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from postcopy.channel.channel import Channel
from postcopy.channel.listen import Listener
from postcopy.channel.whole_file import WholeFile
from postcopy.errors import ChannelBroken, HostCannot, MigrationCancelled, PostcopyError
from postcopy.image.base import LARGEST_RAM_BYTES, ImageBlock
from postcopy.image.finalize import NO_TIMES, Prepared, check_parent, finalize
from postcopy.image.manifest import Manifest
from postcopy.image.options import ImageOptions, SnapshotTimings
from postcopy.image.parser import formats_of
from postcopy.image.publish import CommitPoint, reserved
from postcopy.multifd.group import MultifdGroup
from postcopy.parameters import Parameters
from postcopy.receive.page_file import PageFile, WrittenImage
from postcopy.receive.source_channels import SourceChannels
from postcopy.stream.numbers import SectionType
from postcopy.stream.precopy_decoder import PrecopyDecoder
from postcopy.stream.records import (
    Configuration,
    Description,
    DeviceSection,
    MultifdFlush,
    OpenReturnPath,
    Pages,
    Ping,
    Pong,
    RamRecordsEnd,
    RamSetup,
    Record,
    Shut,
    XbzrlePage,
    ZeroPages,
)
from postcopy.stream.return_path import encode_message

_DEVICES_S: Final = 10.0
"""A source sends devices and description at once; one that then pauses sends no description."""
_LAST_WORD_S: Final = 5.0
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class ReceiveProgress:
    """How far it has come.

    :ivar connected: whether the source has connected.
    :ivar received_bytes: on all channels.
    :ivar page_bytes: of the pages that have come, repeated and zero ones too.
    :ivar ram_bytes: of the source's memory; 0 before that is known.
    :ivar finishing: all has come, and the last digests are taken.
    """

    connected: bool
    elapsed_ms: int
    received_bytes: int
    page_bytes: int
    ram_bytes: int
    finishing: bool


@dataclass(frozen=True, slots=True)
class ReceivedImage:
    """An image that has arrived.

    :ivar channels: of multifd; 0: the memory came on the main channel.
    :ivar received_bytes: on all channels.
    :ivar pages, zero_pages, xbzrle_pages: that have come, repeated ones too.
    :ivar data_bytes, zero_bytes: of the ``ram_bytes``, counted in pages.
    :ivar total_ms: from the connection to the image on the disk; ``finishing_ms`` of it after the last byte
        had come.
    """

    path: Path
    format: str
    identity: str
    machine: str
    channels: int
    received_bytes: int
    pages: int
    zero_pages: int
    xbzrle_pages: int
    ram_bytes: int
    data_bytes: int
    zero_bytes: int
    device_bytes: int
    file_bytes: int
    total_ms: int
    finishing_ms: int

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self) | {"path": str(self.path)}


class Receiver:
    """Receives one image, once.

    :param listener: where the source connects; closed by :meth:`run`.
    :param path: of the image.
    :param note: takes a line for the user; from any thread.
    :param wanted: the form of the image.
    """

    def __init__(
        self,
        listener: Listener,
        path: Path,
        note: Callable[[str], None],
        wanted: ImageOptions | None = None,
    ) -> None:
        self._path = path.absolute()
        self._wanted = wanted or ImageOptions()
        self._listener = listener
        self._commit_point = CommitPoint()
        self._group = MultifdGroup(self._fail)
        self._channels = SourceChannels(listener, self._group, self._fail, note)
        self._failing = threading.Lock()
        self._failure: Exception | None = None  # the first
        self._channel: Channel | None = None
        self._answers = False  # the source has opened the return path
        self._began: float | None = None
        self._ended: float | None = None
        # What the stream has told so far:
        self._configuration: Configuration | None = None
        self._blocks: tuple[ImageBlock, ...] = ()
        self._pages: PageFile | None = None
        self._devices: list[DeviceSection] = []
        self._description: str | None = None
        self._flush_is_said = (
            False  # by records; QEMU 8.0 and older leave it to the ends of sections
        )

    @property
    def progress(self) -> ReceiveProgress:
        """How far it has come; for any thread."""
        pages = self._pages
        now = time.monotonic()
        return ReceiveProgress(
            connected=self._began is not None,
            elapsed_ms=0 if self._began is None else round((now - self._began) * 1000),
            received_bytes=self._received_bytes,
            page_bytes=0 if pages is None else _PAGE_BYTES * (pages.data_pages + pages.zero_pages),
            ram_bytes=sum(block.size_bytes for block in self._blocks),
            finishing=self._ended is not None,
        )

    def cancel(self) -> bool:
        """Give it up, from any thread; return whether that was in time: nothing is published then."""
        words = "given up before the image was whole; the guest stays at the source"
        return self._commit_point.cancel(lambda: self._fail(MigrationCancelled(words)))

    def run(self) -> ReceivedImage:
        """Receive it, and publish the image.

        :raises Refused: the name is not free, or the parent has no store of chunks.
        :raises StreamError: what the source sends is wrong; at its offset in the channel.
        :raises ChannelBroken: the source has gone.
        :raises MigrationCancelled: :meth:`cancel` has been called.
        :raises OSError: the disk is full, or broken.
        """
        try:
            if self._wanted.parent is not None:
                check_parent(self._wanted.parent)
            with reserved(self._path), WholeFile(self._path) as file:
                return self._receive(file)
        finally:
            self._listener.close()

    def _receive(self, file: WholeFile) -> ReceivedImage:
        self._file = file
        try:
            return self._until_published()
        except (PostcopyError, OSError) as error:
            self._fail(error)
            assert self._failure is not None
            if self._failure is error:
                raise
            raise self._failure from error
        finally:
            self._channels.close()  # no thread writes pages any more
            if self._pages is not None:
                self._pages.close()

    def _until_published(self) -> ReceivedImage:
        channel, first = self._channels.main()
        self._began = time.monotonic()
        self._channel = channel
        channel.watch(Parameters().x_link_timeout / 1000)
        self._read(channel, first)
        self._ended = time.monotonic()
        assert self._pages is not None
        written = self._pages.finish(self._devices, self._description)
        found = self._publish(written)
        if self._say(Shut(0)):
            _wait_for_end(channel)
        return found

    def _read(self, channel: Channel, first: bytes) -> None:
        decoder = PrecopyDecoder(formats_of, LARGEST_RAM_BYTES)
        decoder.feed(first)
        ended = False
        while self._description is None:
            record = decoder.next_record()
            if record is not None:
                self._obey(record, decoder)
            elif ended:
                decoder.finish()
                return
            else:
                ended = not self._fill(channel, decoder)

    def _fill(self, channel: Channel, decoder: PrecopyDecoder) -> bool:
        """Receive something; return whether there may be more."""
        if not decoder.in_devices or _is_readable(channel, _DEVICES_S):
            if count := channel.receive_into(decoder.buffer()):
                decoder.received(count)
                return True
            if not decoder.in_devices:
                decoder.finish()
        decoder.end_input()
        return False

    def _obey(self, record: Record, decoder: PrecopyDecoder) -> None:
        pages = self._pages
        match record:
            case Pages():
                assert pages is not None
                pages.write(record)
            case ZeroPages():
                assert pages is not None
                pages.clear(record)
            case XbzrlePage():
                assert pages is not None
                pages.change(record)
            case RamSetup():
                self._begin(record, decoder)
            case MultifdFlush():
                self._flush(said=True)
            case RamRecordsEnd():
                self._end_records(record)
            case _:
                self._note(record)

    def _note(self, record: Record) -> None:
        match record:
            case Configuration():
                self._configuration = record
            case OpenReturnPath():
                self._answers = self._channel is not None and self._channel.can_return
            case Ping():
                self._say(Pong(record.value))
            case DeviceSection():
                self._devices.append(record)
            case Description():
                self._description = record.text

    def _begin(self, setup: RamSetup, decoder: PrecopyDecoder) -> None:
        assert self._configuration is not None
        try:
            self._pages = PageFile(self._file, self._configuration, setup)
        except MemoryError as error:
            total = sum(block.size_bytes for block in setup.blocks)
            what = f"this host has no memory to keep account of {total:#x} bytes of RAM"
            raise HostCannot(what, "free some, or receive on another host") from error
        self._blocks = tuple(ImageBlock(each.name, each.size_bytes) for each in setup.blocks)
        self._group.begin(dict(decoder.layout), self._pages)

    def _flush(self, *, said: bool) -> None:
        if said and not self._flush_is_said:
            self._flush_is_said = True
            self._channels.settle(multifd_is_on=True)
        self._group.rendezvous()

    def _end_records(self, end: RamRecordsEnd) -> None:
        if self._flush_is_said:
            return
        if end.kind == SectionType.START:
            self._channels.settle(multifd_is_on=False)
        self._flush(said=False)

    def _publish(self, written: WrittenImage) -> ReceivedImage:
        """Publish it, in the form that is wanted; until then it may be given up."""
        assert self._configuration is not None
        assert self._pages is not None
        assert self._began is not None
        kept = not self._wanted.chunked and self._wanted.form == "mapped-ram"
        machine, digests = self._configuration.machine, written.digests
        manifest = Manifest("mapped-ram", machine, self._blocks, digests, NO_TIMES)
        made = finalize(
            self._path,
            self._file.partial,
            self._wanted,
            SnapshotTimings(self._began),
            self._commit_point,
            prepared=Prepared(digests, manifest, self._file, written.data_bytes) if kept else None,
        )
        manifest = made.manifest
        ram = sum(block.size_bytes for block in self._blocks)
        return ReceivedImage(
            path=self._path,
            format=manifest.form,
            identity=manifest.identity,
            machine=manifest.machine,
            channels=self._group.count,
            received_bytes=self._received_bytes,
            pages=self._pages.data_pages,
            zero_pages=self._pages.zero_pages,
            xbzrle_pages=self._pages.changed_pages,
            ram_bytes=ram,
            data_bytes=written.data_bytes,
            zero_bytes=ram - written.data_bytes,
            device_bytes=sum(len(device.payload) for device in self._devices),
            file_bytes=self._path.stat().st_blocks * 512,
            total_ms=_ms_since(self._began),
            finishing_ms=_ms_since(self._ended),
        )

    @property
    def _received_bytes(self) -> int:
        main = 0 if self._channel is None else self._channel.received_bytes
        return main + self._group.received_bytes

    def _say(self, message: Pong | Shut) -> bool:
        """Answer, if there is a return path; return whether there is one."""
        if not self._answers or self._channel is None:
            return False
        try:
            self._channel.send(encode_message(message))
        except ChannelBroken:
            self._answers = False  # that the source has gone will be seen where it is read
        return self._answers

    def _fail(self, error: Exception) -> None:
        """Note the first failure, tell the source, and wake all threads; in any thread."""
        with self._failing:
            if self._failure is not None:
                return
            self._failure = error
        if self._answers and self._channel is not None:
            try:
                self._channel.send_if_idle(encode_message(Shut(1)))
            except ChannelBroken:
                pass  # it has gone
        if self._channel is not None:
            self._channel.shutdown()
        self._channels.shutdown()


def _ms_since(moment: float | None) -> int:
    return 0 if moment is None else round((time.monotonic() - moment) * 1000)


def _is_readable(channel: Channel, timeout_s: float) -> bool:
    poll = select.poll()
    for fd in channel.input_fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _wait_for_end(channel: Channel) -> None:
    """Let the source read our last message: to close a socket with unread bytes would break it."""
    view = memoryview(bytearray(_PAGE_BYTES))
    try:
        while _is_readable(channel, _LAST_WORD_S) and channel.receive_into(view):
            pass
    except ChannelBroken:
        pass  # it has gone
