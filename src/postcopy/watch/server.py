"""Serves the page: three static files, and the samples as server-sent events.

Nothing else is served, and nothing is changed by a request.  A request must name this server by an address
or by the name that the user gave: a page of another site, whose name an attacker lets mean 127.0.0.1 (DNS
rebinding), is refused.
"""

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from postcopy.errors import CannotListen, Refused
from postcopy.watch.past import Past
from postcopy.watch.recording import Header
from postcopy.watch.sample import Sample

FILES: Final = {
    "/": ("index.html", "text/html"),
    "/watch.js": ("watch.js", "text/javascript"),
    "/watch.css": ("watch.css", "text/css"),
}
_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_MOST_WATCHERS: Final = 100
_SILENCE_S: Final = 10.0


def page_file(name: str) -> str:
    """The text of one file of the page."""
    return resources.files("postcopy.watch").joinpath("page", name).read_text(encoding="utf-8")


class SampleFeed:
    """The samples so far, encoded once for all watchers; of one event loop."""

    def __init__(self, header: Header, past: Past | None = None) -> None:
        self._header = _event("header", header.to_json())
        self._past = past or Past()
        self._ended = False
        self._news = asyncio.Event()
        self.watchers = 0

    def add(self, sample: Sample) -> None:
        """Give it to all."""
        past = self._past
        kind = "change" if past.is_change(sample) else "sample"
        past.add(sample, _event(kind, sample.to_json(), past.count))
        self._tell()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def events(self, after: int) -> AsyncIterator[bytes]:
        """What one watcher is sent.

        :param after: the number of the last sample that it has.
        """
        self.watchers += 1
        try:
            yield self._header
            position, step, has_ended = after + 1, 1, False
            while True:
                # More may come while this is sent.
                news, events, position = self._news, self._past.since(position), self._past.count
                if step != self._past.step:
                    step = self._past.step
                    yield _event("step", step)
                for event in events:
                    yield event
                if self._ended and not has_ended:
                    has_ended = True
                    yield _event("end", {})
                if news is not self._news:
                    continue
                try:
                    async with asyncio.timeout(_SILENCE_S):
                        await news.wait()
                except TimeoutError:
                    yield b": alive\n\n"
        finally:
            self.watchers -= 1


def _event(kind: str, value: Any, number: int | None = None) -> bytes:
    name = b"" if number is None else b"id: %d\n" % number
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%sevent: %s\ndata: %s\n\n" % (name, kind.encode(), text)


class _Guard:
    """Refuses what is not for this server, and adds the headers that keep the page to itself."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        app: ASGIApp = self._app
        if not self._is_ours(Headers(scope=scope).get("host", "")):
            app = PlainTextResponse("this server has another name\n", status_code=421)
        await app(scope, receive, guarded)

    def _is_ours(self, host: str) -> bool:
        """Whether a name cannot be an attacker's: an address, or what the user gave."""
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if name.lower() in {"localhost", self._name.lower()}:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class _Server(uvicorn.Server):
    """A server in an event loop whose signals are the command's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them."""
        yield


class PageServer:
    """The page of one run; of one event loop."""

    def __init__(self, header: Header) -> None:
        self._feed = SampleFeed(header)
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.add = self._feed.add
        self.end = self._feed.end

    @property
    def watchers(self) -> int:
        """How many browsers are being told."""
        return self._feed.watchers

    async def start(self, address: str) -> str:
        """Listen at ``HOST:PORT`` (port 0: any); return the URL.

        :raises Refused: not such an address.
        :raises CannotListen: it cannot be had.
        """
        host, port = _parse(address)
        listening = _listen(host, port)
        app = Starlette(routes=[*map(self._file, FILES), Route("/events", self._events)])
        config = uvicorn.Config(
            _Guard(app, host), lifespan="off", log_config=None, access_log=False,
            server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve([listening]))
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{listening.getsockname()[1]}/"

    def _file(self, path: str) -> Route:
        name, kind = FILES[path]
        text = page_file(name)

        async def answer(_: Request) -> Response:
            return Response(text, media_type=kind)

        return Route(path, answer)

    async def _events(self, request: Request) -> Response:
        if self._feed.watchers >= _MOST_WATCHERS:
            return PlainTextResponse(f"{_MOST_WATCHERS} browsers watch already\n", status_code=503)
        said = request.headers.get("last-event-id", "")
        after = int(said) if said.isascii() and said.isdigit() and len(said) < 10 else -1
        return StreamingResponse(self._feed.events(after), media_type="text/event-stream")

    async def serve_until_cancelled(self) -> None:
        """Go on serving what there is."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """Stop serving; harmless when done."""
        server, task = self._server, self._task
        self._server = self._task = None
        if server is not None and task is not None:
            server.should_exit = server.force_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise Refused(f"--serve {address!r} is no address; write HOST:PORT, such as 127.0.0.1:8080")
    return host, int(port)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            listening.listen()
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise CannotListen(
            f"cannot serve the page at {host}:{port}: {error.strerror}; give another port, or 0 for any"
        ) from error
    return listening
