"""The destination of a postcopy as a back end sees it: memory that is empty, and a pager that fills it."""

import contextlib
import os
import select
import struct
import threading

from fakes.uffd_events import Pagefault, read_events
from fakes.vhost_front_end import (
    ADD_MEM_REG,
    PAGE,
    POSTCOPY_ADVISE,
    POSTCOPY_END,
    POSTCOPY_LISTEN,
    SET_MEM_TABLE,
    Ram,
)
from postcopy.abi.userfaultfd import Feature
from postcopy.errors import PageExists
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import Userfaultfd

_REGION = struct.Struct("=QQQQ")


class Destination:
    """Empty memory in place of ``source``, a :class:`Ram`, whose pages come when they are asked for.

    :param front_end: has agreed on everything, and sent no memory yet.
    :param held: offsets of pages that do not come.
    """

    def __init__(self, front_end, source, *, held=(), page_bytes=PAGE, one_by_one=False):
        self.source = source
        self.ram = Ram(source.size, like=source)
        self.asked = []
        """Offsets of the pages that were asked for, in order."""
        self._front_end = front_end
        self._held = set(held)
        self._page = page_bytes
        self._received = set()
        self._page_buffer = Mapping.anonymous(page_bytes)
        self._ended = os.eventfd(0)
        _, (fd,) = front_end.ask(POSTCOPY_ADVISE)
        self.userfaultfd = Userfaultfd.from_fd(fd, Feature(0))
        assert front_end.do(POSTCOPY_LISTEN) == 0
        self._theirs = self._slots() if one_by_one else self._table()
        self._thread = threading.Thread(target=self._serve, name="pager")
        self._thread.start()
        number = ADD_MEM_REG if one_by_one else SET_MEM_TABLE
        front_end.send(number, struct.pack("=Q", 0))

    def _table(self):
        table = self.ram.table()
        answer, _ = self._front_end.ask(SET_MEM_TABLE, table, self.ram.fds())
        assert len(answer) == len(table)
        return [_REGION.unpack_from(answer, 8 + 32 * n) for n in range(len(self.ram.regions))]

    def _slots(self):
        answers = []
        for region in self.ram.regions:
            payload = struct.pack("=Q", 0) + _REGION.pack(*region)
            answer, _ = self._front_end.ask(ADD_MEM_REG, payload, [self.ram.fd])
            answers.append(_REGION.unpack_from(answer, 8))
        return answers

    def has_asked_for(self, offset):
        """Whether the back end waits, or has waited, for the page at an offset."""
        return offset // self._page * self._page in self.asked

    def place(self, offset):
        """Give a page, whole."""
        start, address = self._locate(offset)
        data = self.source.bytes[start : start + self._page]
        self._page_buffer.write(0, data)
        with contextlib.suppress(PageExists):
            self.userfaultfd.copy(address, self._page_buffer.address, self._page)
        self.userfaultfd.wake(address, self._page)

    def lose(self, offset):
        """Say that a page will never come."""
        _, address = self._locate(offset)
        self.userfaultfd.poison(address, self._page)

    def end(self):
        """Give all that is missing, and end."""
        self.stop()
        for offset in range(0, self.ram.size, self._page):
            self.place(offset)
        assert self._front_end.number(POSTCOPY_END) == 0

    def stop(self):
        """End the pager alone."""
        os.eventfd_write(self._ended, 1)
        self._thread.join()

    def close(self):
        if self._thread.is_alive():
            self.stop()
        self.userfaultfd.close()
        self._page_buffer.close()
        os.close(self._ended)
        self.ram.close()

    def _locate(self, offset):
        """The beginning of the page at an offset of the memory, and its address in the back end."""
        start = offset // self._page * self._page
        for _, size, user, begins in self._theirs:
            if begins <= start < begins + size:
                return start, user + start - begins
        raise ValueError(offset)

    def _serve(self):
        poll = select.poll()
        poll.register(self.userfaultfd, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        while all(fd != self._ended for fd, _ in poll.poll()):
            for event in read_events(self.userfaultfd):
                assert isinstance(event, Pagefault)
                offset = self._offset_of(event.address)
                self.asked.append(offset)
                if offset not in self._held:
                    self.place(offset)

    def _offset_of(self, address):
        for _, size, user, begins in self._theirs:
            if user <= address < user + size:
                return begins + address - user
        raise ValueError(hex(address))
