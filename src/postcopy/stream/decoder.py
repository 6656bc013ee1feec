"""The decoder: bytes to records, in any pieces.

::

    HEADER ── configuration ──► ELEMENT ◄───────────────┐
                                │  │ PART, END of RAM    │ footer
                                │  └──► RAM ── EOS ──► FOOTER
                                └ EOF ──► TAIL ── description ──► DONE

Each step reads one element and commits, or finds it incomplete and changes nothing.  The decoder
knows no side and keeps no state of a migration: whether a command is in order is for the receiver
to say.  It does know what a receiver has (blocks, devices), since the stream cannot be read
without.
"""

from collections.abc import Callable, Collection
from typing import ClassVar

from postcopy.errors import Refused, StreamError
from postcopy.stream.block_list import EntryForm, read_block_list
from postcopy.stream.commands import CommandContext, name_command, read_command
from postcopy.stream.configuration import read_configuration, read_header
from postcopy.stream.encoded_records import EncodedRamRecords
from postcopy.stream.layout import DeviceFormats, Expected, Layout, Limits, Receiver
from postcopy.stream.mapped_ram import CAPABILITY
from postcopy.stream.numbers import RAM_SECTION_NAME, SectionType
from postcopy.stream.ram_records import RamRecords
from postcopy.stream.reader import DecoderInput, Incomplete
from postcopy.stream.records import (
    BegunPage,
    Description,
    DeviceSection,
    EndOfStream,
    Pages,
    PostcopyAdvise,
    PostcopyRun,
    RamBody,
    RamBodyEnd,
    RamRecordsEnd,
    RamSetup,
    Record,
    ZeroPages,
)
from postcopy.stream.sections import (
    SectionHead,
    check_ram_head,
    read_device,
    read_footer,
    read_head,
)


class Decoder(DecoderInput):
    """Decodes the main channel, a file, or (``package=True``) what a package holds.

    One thread only.  Receive into :meth:`buffer`, say :meth:`received`, take records with
    :meth:`next_record` until it gives ``None``, and say :meth:`finish` when the peer has closed.

    After a :class:`StreamError` the decoder is of no more use.
    """

    _takes_mapped_ram: ClassVar[bool] = False

    def __init__(
        self,
        devices: DeviceFormats,
        layout: Layout,
        *,
        package: bool = False,
        multifd: bool = False,
        expect: Expected | None = None,
        limits: Limits | None = None,
        ignored_blocks: Collection[str] = (),
    ) -> None:
        """Make a decoder for one stream.

        :param layout: the receiver's blocks.
        :param package: the elements of a package: no header; nothing counts behind ``RUN``.
        :param multifd: flushes of multifd's channels may come.
        :param expect: what the configuration section must agree with.
        :param ignored_blocks: blocks the peer may have, whose pages are dropped.
        :raises Refused: ``mapped-ram`` is expected, which :class:`MappedDecoder` is for.
        """
        super().__init__()
        self._devices = devices
        self._expect = expect or Expected()
        self._limits = limits or Limits()
        self._package = package
        self._receiver = Receiver(layout, frozenset(ignored_blocks))
        self._commands = CommandContext(self._receiver, self._limits.package_bytes, package)
        self._multifd = multifd
        self._ram = EncodedRamRecords(self._receiver, self._limits)
        self._ram_section_id: int | None = None
        self._body = SectionType.PART  # of the RAM section that we are in
        self._advised: PostcopyAdvise | None = None
        self._finished = False
        self._element = "the header"  # where we are, for StreamCut
        self._step: Callable[[], Record | None] = (
            self._read_element if package else self._read_start
        )
        if CAPABILITY in self._expect.capabilities and not self._takes_mapped_ram:
            raise Refused("mapped-ram files cannot be decoded as a stream")

    @property
    def finished(self) -> bool:
        """The end of the stream, or in a package ``RUN``, has been read."""
        return self._finished

    @property
    def ram_section_id(self) -> int | None:
        """The id that RAM's sections bear, once they have begun."""
        return self._ram_section_id

    def resume(self, ram_section_id: int | None = None) -> None:
        """Go on with a new connection, after a recovery: no header, all halves are dropped.

        :param ram_section_id: as it was, for a decoder that has not seen RAM's set-up itself.
        """
        self._reader.drop_all()
        self._ram.forget()
        if ram_section_id is not None:
            self._ram_section_id = ram_section_id
        self._finished = False
        self._next(self._read_element, "an element")

    def next_record(self) -> Record | None:
        """Decode the next record; ``None``: it needs more bytes.

        Ends the life of :class:`Pages` given out before.

        :raises StreamError: the stream is wrong.
        """
        reader = self._reader
        while True:
            if self._package and self._finished:
                reader.drop_all()
                return None
            try:
                record = self._step()
            except Incomplete:
                reader.rollback()
                return None
            reader.commit()
            if record is not None:
                return record

    def begun_page(self) -> BegunPage | None:
        """What there is of a page that has not come whole, when :meth:`next_record` gave ``None``.

        With multifd never: other channels may bring the pages behind it.
        """
        if self._multifd or self._step != self._read_ram:
            return None
        return self._ram.begun(self._reader)

    @property
    def page_read(self) -> tuple[str | None, int | None]:
        """The block named last, and the byte offset of the page read last; None: that was a zero page."""
        return self._ram.block, self._ram.page_read

    def finish(self) -> None:
        """Say that no more bytes will come; call it when :meth:`next_record` gives ``None``.

        :raises StreamCut: the stream has not come to its end.
        """
        reader = self._reader
        if not self._finished:
            raise self._cut(self._element)
        if reader.pending:
            raise self._cut("the description")

    # Section: steps.  Each reads one element, or raises Incomplete having changed nothing.

    def _next(self, step: Callable[[], Record | None], element: str) -> None:
        self._step = step
        self._element = element

    def _read_start(self) -> None:
        read_header(self._reader)
        self._next(self._read_configuration, "the configuration")

    def _read_configuration(self) -> Record:
        configuration = read_configuration(self._reader, self._expect)
        self._next(self._read_element, "an element")
        return configuration

    def _read_element(self) -> Record | None:
        self._element = "an element, without an end of stream"
        kind = self._reader.u8()
        match kind:
            case SectionType.PART | SectionType.END:
                return self._begin_body(SectionType(kind))
            case SectionType.COMMAND:
                return self._read_command()
            case SectionType.FULL:
                return self._read_device()
            case SectionType.START:
                return self._read_setup()
            case SectionType.EOF:
                self._finished = True
                self._next(self._read_tail, "the description")
                return EndOfStream()
        raise StreamError(f"Unknown savevm section type {kind}", self._reader.position - 1)

    def _begin_body(self, kind: SectionType) -> RamBody:
        section_id = self._reader.u32()
        if section_id != self._ram_section_id:
            self._reader.fail(f"Unknown savevm section {section_id}", 4)
        self._body = kind
        self._next(self._read_ram, "a section of ram")
        return RamBody(kind)

    def _read_ram(self) -> Record | None:
        read = self._ram.read_or_flush if self._multifd else self._ram.read_or_delta
        record: Record | None = read(self._reader)
        if record is None:
            self._next(self._end_body, "the footer of a section of ram")
            return RamRecordsEnd(self._body) if self._multifd else None
        return record

    def _end_body(self) -> RamBodyEnd:
        assert self._ram_section_id is not None
        read_footer(self._reader, RAM_SECTION_NAME, self._ram_section_id)
        self._next(self._read_element, "an element")
        return RamBodyEnd(self._body)

    def _read_tail(self) -> Description:
        reader = self._reader
        if (kind := reader.u8()) != SectionType.DESCRIPTION:
            reader.fail(f"Expected vmdescription section, but got {kind}", 1)
        length = reader.u32()
        if length > self._limits.description_bytes:
            reader.fail(
                f"description of {length} bytes; at most {self._limits.description_bytes} "
                "are taken",
                4,
            )
        text = reader.text(length)
        self._next(self._read_garbage, "nothing")
        return Description(text)

    def _read_garbage(self) -> None:
        byte = self._reader.u8()
        self._reader.fail(f"byte {byte:#04x} behind the end of the stream", 1)

    def _read_command(self) -> Record | None:
        offset = self._reader.position - 1
        self._element = name_command(self._reader)
        record = read_command(self._reader, self._commands)
        if isinstance(record, PostcopyAdvise):
            self._note_advise(record, offset)
        elif isinstance(record, PostcopyRun) and self._package:
            self._finished = True
        return record

    def _note_advise(self, advise: PostcopyAdvise, offset: int) -> None:
        # QEMU's destination empties its RAM on ADVISE, silently, whatever it has received before.
        if self._ram_section_id is not None:
            raise StreamError("CMD_POSTCOPY_ADVISE behind the list of RAM blocks", offset)
        if self._advised is not None:
            raise StreamError("CMD_POSTCOPY_ADVISE in wrong postcopy state (1)", offset)
        self._advised = advise

    def _read_ram_head(self) -> SectionHead:
        head = read_head(self._reader)
        self._element = "section ram"
        check_ram_head(self._reader, head)
        if self._ram_section_id is not None:
            self._reader.fail("ram is set up twice")
        return head

    def _read_setup(self) -> RamSetup | None:
        head = self._read_ram_head()
        advised = self._advised is not None and self._advised.page_sizes is not None
        form = EntryForm(advised, "x-ignore-shared" in self._expect.capabilities)
        blocks, flush = read_block_list(self._reader, self._receiver, form, multifd=self._multifd)
        self._ram_section_id = head.section_id
        # QEMU sends the footer late: with multifd not before the flush has been obeyed.
        self._next(self._end_setup, "section ram")
        return RamSetup(head.section_id, blocks, flush)

    def _end_setup(self) -> None:
        assert self._ram_section_id is not None
        read_footer(self._reader, RAM_SECTION_NAME, self._ram_section_id)
        self._next(self._read_element, "an element")

    def _read_device(self) -> DeviceSection:
        head = read_head(self._reader)
        self._element = f"section {head.name}"
        return read_device(self._reader, head, self._devices, self._limits.device_bytes)


class PreemptDecoder(DecoderInput):
    """Decodes the preempt channel: RAM records of requested pages, without any framing around them.

    Its CONTINUE refers to blocks named on this channel.  Use it as
    :class:`postcopy.stream.decoder.Decoder`.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        limits: Limits | None = None,
        ignored_blocks: Collection[str] = (),
    ) -> None:
        super().__init__()
        receiver = Receiver(layout, frozenset(ignored_blocks))
        self._ram = RamRecords(receiver, limits or Limits())

    def next_record(self) -> Pages | ZeroPages | None:
        """Decode the next pages; ``None``: it needs more bytes.

        :raises StreamError: the stream is wrong.
        """
        try:
            # An EOS ends nothing here, but is tolerated.
            while (record := self._ram.read(self._reader)) is None:
                pass
        except Incomplete:
            self._reader.rollback()
            return None
        return record

    def begun_page(self) -> BegunPage | None:
        """As :meth:`Decoder.begun_page`."""
        return self._ram.begun(self._reader)

    @property
    def page_read(self) -> tuple[str | None, int | None]:
        """As :attr:`Decoder.page_read`."""
        return self._ram.block, self._ram.page_read

    def finish(self) -> None:
        """Say that no more bytes will come.

        :raises StreamCut: they end in the middle of a page.
        """
        if self._reader.pending:
            raise self._cut("a requested page")
