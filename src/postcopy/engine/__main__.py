"""``python -m postcopy.engine --link FD``: started by a guest's process, never by hand."""

import argparse
import gc
import os
import socket
import sys
import threading

from postcopy.engine.service import EngineService

_SWITCH_INTERVAL_S = 0.0001
"""How long one thread of the engine may keep the others from running: a page may be waited for."""


def end_on_fault() -> None:
    """Let a fault of ours in any thread end this process: its successor knows what to do.

    A thread that dies alone would leave an engine that looks alive and serves no page.
    """
    threading.excepthook = _end


def _end(fault: threading.ExceptHookArgs) -> None:
    threading.__excepthook__(fault)
    os._exit(1)


def main() -> None:
    """Serve one guest's process until it closes the link."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--link", type=int, required=True, help="descriptor of the Unix socket")
    arguments = parser.parse_args()
    end_on_fault()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.freeze()  # what importing has made lives as long as the process
    EngineService(socket.socket(fileno=arguments.link)).run()


if __name__ == "__main__":
    main()
