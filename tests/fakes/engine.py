"""Engines that are threads of this process, and know next to nothing."""

import socket
import threading

from postcopy.link.rpc import Link


class FakeCommands:
    """What it understands."""

    def echo(self, text): ...
    def die(self): ...


class FakeEngine:
    """An engine in this process; it answers ``echo``, and dies of ``die``."""

    process_id = 0

    def __init__(self):
        self._ours, theirs = socket.socketpair()
        self.link = None
        self.ended = threading.Event()
        handlers = {"echo": lambda text: text, "die": self._die}
        self.far = Link(theirs, handlers, on_end=self.ended.set)
        self.far.start()

    def _die(self):
        self.far.close()

    def connect(self, handlers, on_end):
        self.link = Link(self._ours, handlers, on_end=on_end)
        self.link.start()
        return self.link

    def watch(self, hang_looks):
        pass

    def end(self):
        if self.link is None:
            self._ours.close()
        else:
            self.link.close()


class FakePool:
    """Hands out engines; ``first`` is called before each."""

    def __init__(self, first=lambda: None):
        self._first = first
        self.taken = []

    def prepare(self, delay_s=0.0):
        pass

    def take(self):
        self._first()
        self.taken.append(FakeEngine())
        return self.taken[-1]

    def close(self):
        pass
