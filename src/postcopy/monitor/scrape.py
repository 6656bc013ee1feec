"""Serves the metrics of one machine to Prometheus: HTTP over TCP or a Unix socket, and nothing but GET."""

import contextlib
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import Metric

from postcopy.channel.address import TcpAddress, parse_socket, tcp_uri
from postcopy.monitor.controls import Backend
from postcopy.monitor.metrics import METRICS, Reading
from postcopy.monitor.server import MonitorServer

SCRAPE_S: Final = 10.0
"""How long a client may be silent while it sends its request, or reads the answer."""

MOST_SCRAPES: Final = 16
"""Clients at a time; each has a thread."""

_TEXT_FORMAT: Final = "text/plain; version=0.0.4; charset=utf-8"
_LOOPBACK: Final = "127.0.0.1"


def serve_metrics(address: str, backend: Backend) -> MonitorServer:
    """Serve metrics at ``address``; a TCP address without a host is one of loopback.

    See :class:`~postcopy.monitor.server.MonitorServer`, also for the errors.
    """
    where = parse_socket(address, "metrics")
    if isinstance(where, TcpAddress) and not where.host:
        address = tcp_uri(_LOOPBACK, where.port)
    return MonitorServer(address, backend, ScrapeSession, whose="metrics", most=MOST_SCRAPES)


class MachineMetrics:
    """The metrics of one machine, as prometheus-client collects them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        """Ask the machine, and make the metrics of what it says."""
        reading = Reading.take(self._backend)
        for row in METRICS:
            family = row.family(reading)
            if family is not None:
                yield family


class ScrapeSession:
    """Answers one request with the metrics in Prometheus' text format."""

    def __init__(self, connection: socket.socket, backend: Backend) -> None:
        self._connection = connection
        self._backend = backend

    def run(self) -> None:
        """Answer; a client that breaks off, or sends something else than HTTP, is dropped."""
        metrics = MachineMetrics(self._backend)

        class Answer(BaseHTTPRequestHandler):
            timeout = SCRAPE_S

            def do_GET(self) -> None:
                text = generate_latest(metrics)
                self.send_response(200)
                self.send_header("Content-Type", _TEXT_FORMAT)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - http.server's
                """Log nothing."""

        with self._connection, contextlib.suppress(OSError):
            Answer(self._connection, ("", 0), None)  # type: ignore[arg-type]

    def close(self) -> None:
        """End from another thread."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
