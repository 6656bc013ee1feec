"""``python -m postcopy.engine --link FD``: started by a guest's process, never by hand."""

import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from postcopy.engine.engine import COMMANDS, Engine
from postcopy.stacks import tell_when_asked

_SWITCH_INTERVAL_S = 0.0001
"""How long one thread of the engine may keep the others from running: a page may be waited for."""

_COLLECTIONS = (700, 10, 10)
"""Python's own thresholds: each collection is so short that a thread may wait for a page meanwhile."""


def end_on_fault(tell: Callable[[BaseException], None]) -> None:
    """Let a fault of ours in any thread end this process: its successor knows what to do.

    A thread that dies alone would leave an engine that looks alive and serves no page.

    :param tell: told of the fault before.
    """

    def end(fault: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(fault)
        if fault.exc_value is not None:
            tell(fault.exc_value)
        os._exit(1)

    threading.excepthook = end


def serve(link: int, commands: Iterable[type[Any]]) -> None:
    """Serve one guest's process until it closes the link; this process ends then.

    :param link: descriptor of the Unix socket.
    :param commands: what it is to be ready for before it takes orders.
    """
    tell_when_asked()
    # Of the terminal it is in the background, where `stty tostop` would stop it at its first word.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    engine = Engine(socket.socket(fileno=link))
    end_on_fault(engine.tell_fault)
    engine.preload(commands)
    gc.freeze()  # what importing has made lives as long as the process
    gc.set_threshold(*_COLLECTIONS)
    engine.run()


def main() -> None:
    """Serve the process that has started this one, with whatever job there is."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--link", type=int, required=True, help="descriptor of the Unix socket")
    serve(parser.parse_args().link, COMMANDS)


if __name__ == "__main__":
    main()
