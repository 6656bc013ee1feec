"""The server gives the page to those that name it rightly, and the samples to each of them."""

import asyncio
import json

import pytest

from fakes.watching import HEADER, samples
from postcopy.errors import CannotListen, Refused
from postcopy.watch.server import FILES, PageServer, SampleFeed


def serve(work, address="127.0.0.1:0"):
    """Run ``work(port, server)`` beside a server."""

    async def run():
        server = PageServer(HEADER)
        url = await server.start(address)
        assert url.startswith("http://127.0.0.1:")
        try:
            async with asyncio.timeout(20):
                return await work(int(url.rstrip("/").rpartition(":")[2]), server)
        finally:
            await server.close()

    return asyncio.run(run())


async def get(port, path="/", host=None, method="GET"):
    """Status, headers and body of one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    name = f"127.0.0.1:{port}" if host is None else host
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = text.partition("\r\n\r\n")
    lines = head.splitlines()
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, body


def test_it_serves_the_page_and_nothing_else():
    async def work(port, _):
        for path in FILES:
            status, headers, body = await get(port, path)
            assert status == 200
            assert headers["content-security-policy"].startswith("default-src 'self';")
            assert headers["x-content-type-options"] == "nosniff"
            assert body
        for path in ("/../pyproject.toml", "/page/index.html", "/docs", "/%2e%2e/x"):
            assert (await get(port, path))[0] == 404
        assert (await get(port, "/", method="POST"))[0] == 405

    serve(work)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:80", "[::1]:99", "10.0.0.1"])
def test_a_request_that_names_an_address_is_answered(host):
    assert serve(lambda port, _: get(port, host=host))[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "", "127.0.0.1.evil.example", "[x"]
)
@pytest.mark.parametrize("path", ["/", "/events", "/watch.js"])
def test_a_request_that_names_another_is_refused(host, path):
    status, headers, body = serve(lambda port, _: get(port, path, host))
    assert status == 421
    assert "content-security-policy" in headers
    assert "memory" not in body


async def taken(port, count, after=None):
    """The first events of a watcher: kind, number, value."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    last = "" if after is None else f"Last-Event-ID: {after}\r\n"
    writer.write(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n{last}\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    found, event = [], {}
    while len(found) < count:
        line = (await reader.readline()).decode().rstrip("\r\n")
        name, separator, value = line.partition(": ")
        if separator and name in {"id", "event", "data"}:
            event[name] = value
        elif "event" in event and not line:
            found.append((event["event"], event.get("id"), json.loads(event["data"])))
            event = {}
    writer.close()
    return found


def test_each_watcher_gets_every_sample_once():
    async def work(port, server):
        made = samples()
        for sample in made[:5]:
            server.add(sample)
        waiting = [asyncio.create_task(taken(port, 1 + len(made) + 1)) for _ in range(10)]
        # One event more than there are now: else this one could have left before the others come.
        late = asyncio.create_task(taken(port, 4, after=2))
        while server.watchers < 11:
            await asyncio.wait(waiting, timeout=0.01)
        for sample in made[5:]:
            server.add(sample)
        server.end()
        for found in await asyncio.gather(*waiting):
            assert found[0] == ("header", None, HEADER.to_json())
            assert {kind for kind, _, _ in found[1:-1]} == {"sample", "change"}
            assert found[-1][0] == "end"
            assert [number for _, number, _ in found[1:-1]] == [str(n) for n in range(len(made))]
            values = [value for _, _, value in found[1:-1]]
            assert values == json.loads(json.dumps([sample.to_json() for sample in made]))
        assert [number for _, number, _ in await late] == [None, "3", "4", "5"]

    serve(work)


def test_what_is_encoded_is_encoded_once():
    async def work():
        feed = SampleFeed(HEADER)
        for sample in samples():
            feed.add(sample)
        feed.end()
        taken = []
        for _ in range(2):
            events = feed.events(-1)
            taken.append([await anext(events) for _ in range(22)])
            await events.aclose()
        assert all(a is b for a, b in zip(*taken, strict=True) if b"end" not in a[:12])
        assert feed.watchers == 0

    asyncio.run(work())


def test_a_sample_that_comes_while_another_is_sent_is_not_lost():
    async def work():
        made = samples()
        feed = SampleFeed(HEADER)
        feed.add(made[0])
        events = feed.events(-1)
        await anext(events)
        found = [await anext(events)]
        for sample in made[1:3]:  # the watcher is being sent the one before
            feed.add(sample)
        async with asyncio.timeout(20):
            found += [await anext(events), await anext(events)]
        await events.aclose()
        assert [event.splitlines()[0] for event in found] == [b"id: 0", b"id: 1", b"id: 2"]

    asyncio.run(work())


def test_a_watcher_too_many_is_refused(monkeypatch):
    monkeypatch.setattr("postcopy.watch.server._MOST_WATCHERS", 0)
    assert serve(lambda port, _: get(port, "/events"))[0] == 503


@pytest.mark.parametrize("address", ["8080", "localhost", ":80", "a:b", "127.0.0.1:70000"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(Refused, match="write HOST:PORT"):
        serve(get, address)


def test_a_port_that_is_taken_is_refused():
    async def work(port, _):
        with pytest.raises(CannotListen, match="give another port"):
            await PageServer(HEADER).start(f"127.0.0.1:{port}")

    serve(work)
