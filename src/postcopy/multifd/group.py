"""The channels of multifd of one source: a thread each, and the rendezvous that keeps copies in order.

A page that the guest writes again is sent again, perhaps on another channel.  So a source ends each pass
over its memory with a SYNC on each channel, and a flush on the main channel: what comes behind one of them
is placed when all that comes before any of them has been.

QEMU 8.0 and older send no flush: each end of records on the main channel is one.
"""

import select
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from postcopy.channel.channel import Channel
from postcopy.errors import ChannelBroken, PostcopyError, StreamCut, StreamError
from postcopy.stream.layout import Layout
from postcopy.stream.multifd import MultifdDecoder, MultifdInitial, MultifdRecord, MultifdSync
from postcopy.stream.records import Pages, ZeroPages

MOST_CHANNELS: Final = 255
"""As many as QEMU can be told to have."""

_SILENT_S: Final = 60.0
MAGIC_BYTES: Final = 4
IDENTIFY_S: Final = 10.0
"""How long a connection may take to say what it is."""


@dataclass(frozen=True, slots=True)
class ExpectedChannels:
    """What a reader that knows its source expects.

    :ivar count: returns the number of the channels; asked when one comes.
    :ivar uuid: of the machine, 16 bytes; all zero if it has none.
    """

    count: Callable[[], int]
    uuid: bytes = bytes(16)


class PageTarget(Protocol):
    """Where the pages go; for any thread."""

    def write(self, pages: Pages) -> None:
        """Place pages."""

    def clear(self, zeros: ZeroPages) -> None:
        """Make pages zero."""


Place: TypeAlias = Callable[[str, int, int], memoryview | None]
"""``place(block, offset, length)`` gives the memory of neighbouring pages, to be received there, in bytes;
None: they are to be given to the target."""


class _Member:
    """A channel that has said that it is one of multifd's."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel = channel
        self.number = number
        self.syncs = 0  # under the group's lock
        self.ended = False  # likewise


class MultifdGroup:
    """All channels of multifd.

    :param on_failure: called in the thread of a channel that has failed.
    :param expected: None: any number of channels of any machine.
    """

    def __init__(
        self, on_failure: Callable[[Exception], None], expected: ExpectedChannels | None = None
    ) -> None:
        self._on_failure = on_failure
        self._expected = expected
        self._changed = threading.Condition()
        # Under `_changed`:
        self._members: dict[int, _Member] = {}
        self._uuid: bytes | None = None
        self._layout: Layout | None = None
        self._target: PageTarget | None = None
        self._place: Place | None = None
        self._released = 0  # the number of rendezvous that are over
        self._closed = False

    @property
    def count(self) -> int:
        """How many channels there are."""
        return len(self._members)

    @property
    def complete(self) -> bool:
        """Whether no channel is missing between the first and the last: sources count them from 0."""
        with self._changed:
            return set(self._members) == set(range(len(self._members)))

    @property
    def all_there(self) -> bool:
        """Whether all channels that are expected have come."""
        assert self._expected is not None
        return len(self._members) >= self._expected.count()

    def wait_for_all(self, timeout_s: float) -> None:
        """Wait until all channels that are expected have come.

        :raises StreamError: they have not, within the time.
        :raises ChannelBroken: :meth:`close` has been called.
        """
        assert self._expected is not None
        with self._changed:
            self._changed.wait_for(lambda: self.all_there or self._closed, timeout_s)
            self._check_open()
            have, want = len(self._members), self._expected.count()
        if have < want:
            raise StreamError(
                f"multifd: the source has opened {have} of {want} channels within {timeout_s:g} s; set "
                "multifd and multifd-channels to the same at both sides"
            )

    @property
    def received_bytes(self) -> int:
        """What has come on all of them."""
        with self._changed:
            return sum(member.channel.received_bytes for member in self._members.values())

    @property
    def channels(self) -> list[Channel]:
        """The channels that have come."""
        with self._changed:
            return [member.channel for member in self._members.values()]

    def begin(self, layout: Layout, target: PageTarget, place: Place | None = None) -> None:
        """Let pages be placed: the main channel has told of the blocks.

        :param place: where plain neighbouring pages are received at once, without the target.
        """
        with self._changed:
            self._layout, self._target, self._place = layout, target, place
            self._changed.notify_all()

    def rendezvous(self) -> None:
        """Wait until each channel has come to its next SYNC, and let all of them go on.

        :raises StreamError: one has ended before it, or sends nothing for a minute.
        :raises ChannelBroken: :meth:`close` has been called.
        """
        with self._changed:
            wanted = self._released + 1
            before = -1
            while late := [each for each in self._members.values() if each.syncs < wanted]:
                self._check_open()
                for member in late:
                    if member.ended:
                        raise StreamError(f"multifd channel {member.number} ends before a flush")
                if not self._changed.wait(_SILENT_S):
                    received = sum(each.channel.received_bytes for each in late)
                    if received == before:
                        numbers = ", ".join(str(each.number) for each in late)
                        raise StreamError(
                            f"multifd: channel {numbers} did not come to a flush within "
                            f"{_SILENT_S:g} s"
                        )
                    before = received
            self._released = wanted
            self._changed.notify_all()

    def close(self) -> None:
        """Break all channels.  Any number of times, from any thread."""
        with self._changed:
            self._closed = True
            members = list(self._members.values())
            self._changed.notify_all()
        for member in members:
            member.channel.shutdown()

    def run(self, channel: Channel, first: bytes, on_known: Callable[[], None]) -> None:
        """Receive one channel until it ends; in a thread of its own.

        :param first: what has been received of it already.
        :param on_known: called once: it belongs to the group, or has failed to.
        """
        member: _Member | None = None
        decoder = MultifdDecoder(self._wait_for_layout)
        try:
            decoder.feed(first)
            while True:
                record = decoder.next_record()
                if isinstance(record, MultifdInitial):
                    member = self._register(channel, record)
                    on_known()
                elif record is not None:
                    assert member is not None
                    self._obey(member, record)
                elif self._receive_in_place(channel, decoder):
                    pass
                elif count := channel.receive_into(
                    decoder.buffer()[: decoder.wanted], whole=decoder.is_sure
                ):
                    decoder.received(count)
                else:
                    decoder.finish()
                    break
        except (PostcopyError, OSError) as error:
            self._fail(member, error)
        finally:
            with self._changed:
                if member is not None:
                    member.ended = True
                self._changed.notify_all()
            if member is None:
                on_known()

    def _receive_in_place(self, channel: Channel, decoder: MultifdDecoder) -> bool:
        """Receive the pages of a packet where they belong; return False if that is not possible."""
        run = decoder.plain_run()
        if run is None or self._place is None or (memory := self._place(*run)) is None:
            return False
        n_behind = channel.receive_all(memory, decoder.behind_run()) - len(memory)
        if n_behind < 0:
            decoder.finish()  # which raises
        decoder.run_placed()
        decoder.received(n_behind)
        return True

    def _fail(self, member: _Member | None, error: PostcopyError | OSError) -> None:
        if isinstance(error, StreamError):
            name = "multifd" if member is None else f"multifd channel {member.number}"
            kind = StreamCut if isinstance(error, StreamCut) else StreamError
            error = kind(f"{name}: {error.message.removeprefix('multifd: ')}", error.offset)
        self._on_failure(error)

    def _register(self, channel: Channel, initial: MultifdInitial) -> _Member:
        with self._changed:
            number = initial.channel
            if self._expected is not None:
                self._check_expected(initial, self._expected)
            if number in self._members:
                raise StreamError(f"multifd: two channels have the number {number}", 24)
            if self._uuid not in {None, initial.uuid}:
                raise StreamError("multifd: the channels have different UUIDs of a machine", 8)
            self._uuid = initial.uuid
            member = self._members[number] = _Member(channel, number)
            self._changed.notify_all()
            return member

    def _check_expected(self, initial: MultifdInitial, expected: ExpectedChannels) -> None:
        if initial.channel >= (count := expected.count()):
            raise StreamError(
                f"multifd: received channel id {initial.channel} is greater than number of channels "
                f"{count}; set multifd-channels to the same at both sides",
                24,
            )
        if initial.uuid != expected.uuid:
            raise StreamError(
                f"multifd: received uuid '{uuid.UUID(bytes=initial.uuid)}' and expected uuid "
                f"'{uuid.UUID(bytes=expected.uuid)}' for channel {initial.channel}; give both machines "
                "the same -uuid",
                8,
            )

    def _obey(self, member: _Member, record: MultifdRecord) -> None:
        target = self._target
        if isinstance(record, MultifdSync):
            with self._changed:
                member.syncs += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._released >= member.syncs or self._closed)
                self._check_open()
            return
        assert target is not None  # the layout has been asked for
        if isinstance(record, Pages):
            target.write(record)
        elif isinstance(record, ZeroPages):
            target.clear(record)

    def _wait_for_layout(self) -> Layout:
        with self._changed:
            self._changed.wait_for(lambda: self._layout is not None or self._closed)
            self._check_open()
            assert self._layout is not None
            return self._layout

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelBroken("multifd: closed on this side")


def first_bytes(channel: Channel) -> bytes:
    """Receive the first four bytes of a channel; fewer if they do not come within ten seconds.

    :raises ChannelBroken: it has broken.
    """
    poll = select.poll()
    for fd in channel.input_fds:
        poll.register(fd, select.POLLIN)
    found = bytearray()
    until = time.monotonic() + IDENTIFY_S
    while len(found) < MAGIC_BYTES:
        left_ms = max(0.0, until - time.monotonic()) * 1000
        # An encrypted channel may have taken these bytes already, with the end of its handshake.
        if not channel.encrypted and not poll.poll(left_ms):
            break
        piece = bytearray(MAGIC_BYTES - len(found))
        count = channel.receive_into(memoryview(piece))
        if not count:
            break
        found += piece[:count]
    return bytes(found)
