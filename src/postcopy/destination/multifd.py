"""Multifd at the destination: where the pages go, and when the main channel waits for the others.

All of this is over before the guest can run here: the main channel waits at the last flush for all that was
sent before it.
"""

from collections.abc import Callable, Iterable, Mapping

from postcopy.destination.incoming_channels import Surroundings
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.multifd.group import ExpectedChannels, MultifdGroup
from postcopy.paging.placement import Placement
from postcopy.parameters import Parameters
from postcopy.stream.layout import BlockLayout
from postcopy.stream.records import Pages, RamSetup, ZeroPages


class _Placing:
    """Places the pages of all channels, before the guest runs; drops those of blocks not of this side."""

    def __init__(self, placement: Placement, names: Iterable[str]) -> None:
        self._placement = placement
        self._names = frozenset(names)

    def write(self, pages: Pages) -> None:
        if pages.block in self._names:
            self._placement.pages(
                pages.block, pages.offsets, pages.data, neighbours=pages.neighbours
            )

    def clear(self, zeros: ZeroPages) -> None:
        if zeros.block in self._names:
            self._placement.zeros(zeros.block, zeros.offsets)

    def place(self, block: str, offset: int, length: int) -> memoryview | None:
        return self._placement.place(block, offset, length) if block in self._names else None


class IncomingMultifd:
    """The channels of one source.  Does nothing until :meth:`switch_on` has been called.

    :ivar parameters: as they are now.
    """

    def __init__(self, surroundings: Surroundings, parameters: Callable[[], Parameters]) -> None:
        self._surroundings = surroundings
        self.parameters = parameters
        self._over = False  # what happens to a channel is of no consequence any more
        self._settled = False
        # QEMU 8.0 and older send no flushes: the end of each section is one.
        self._flush_is_said = False
        self.group: MultifdGroup | None = None
        self.failure: PostcopyError | None = None

    def switch_on(self) -> MultifdGroup:
        """Expect channels; return what is to run them."""
        self.group = MultifdGroup(
            self._failed, ExpectedChannels(lambda: self.parameters().multifd_channels)
        )
        return self.group

    def settle(self) -> None:
        """Wait until all channels are there: a source opens them before it sends any page.

        :raises StreamError: one is missing.
        :raises ChannelBroken: the migration ends.
        """
        if self.group is None or self._settled:
            return
        self.group.wait_for_all(self._surroundings.patience_s)
        self._settled = True
        for channel in self.group.channels:
            channel.watch(self._surroundings.timeout_s)

    def begin(self, setup: RamSetup, ignored: Mapping[str, int]) -> None:
        """The source has told of its blocks: let pages be placed.

        :param ignored: blocks whose pages are dropped, with their sizes in bytes.
        """
        if self.group is None:
            return
        self.settle()
        dropped = {name: BlockLayout(size) for name, size in ignored.items()}
        layout = self._surroundings.layout
        placing = _Placing(self._surroundings.placement(), layout)
        self.group.begin({**layout, **dropped}, placing, placing.place)
        self._flush_is_said = setup.multifd_flush
        self.flush()

    def flush(self) -> None:
        """Wait until all pages are in place that were sent before here."""
        if self.group is not None:
            self.group.rendezvous()

    def section_ended(self) -> None:
        """The records of a section of RAM have ended on the main channel."""
        if not self._flush_is_said:
            self.flush()

    def end(self) -> None:
        """The last page has been placed; the source may close its channels."""
        self._over = True

    @property
    def received_bytes(self) -> int:
        """What has come on all channels."""
        return self.group.received_bytes if self.group is not None else 0

    def shutdown(self) -> None:
        """Break all channels; any number of times, from any thread."""
        if self.group is not None:
            self.group.close()

    def _failed(self, error: Exception) -> None:
        if self._over or self.failure is not None:
            return
        self.failure = error if isinstance(error, PostcopyError) else ChannelBroken(str(error))
        self._surroundings.on_failure()
