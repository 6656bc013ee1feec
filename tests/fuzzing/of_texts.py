"""Readers of JSON, and of lines that are typed at a monitor."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from fakes.monitor_backend import make_backend
from fuzzing.mutations import mutated, mutated_json
from fuzzing.readers import Reader
from postcopy.errors import PostcopyError, StreamError
from postcopy.monitor.hmp import Hmp
from postcopy.monitor.json_stream import JsonError, JsonStream
from postcopy.monitor.qmp_session import COMMANDS as QMP
from postcopy.monitor.qmp_session import QmpError, parse
from postcopy.stream.described_state import decode_state, flatten
from postcopy.stream.description import DescribedFormats, described_bytes, parse_description

MEMORY_BYTES = 64 << 10
WRITES_FILES = "memsave"
MOST_ANSWER_CHARACTERS = 1 << 20
LINES = [
    "info migrate", "info status", "migrate -d tcp:[::1]:1", "migrate -r unix:/x",
    "migrate_set_capability postcopy-ram on", "migrate_set_parameter max-bandwidth 100M", "xp /16xb 0x1000",
    "x-colo-lost-heartbeat", "help migrate", "migrate_incoming tcp:[::]:0", "print /x 1+(2*~3)&0xff",
    "xp /2xg $pc+4", "migrate_recover unix:/tmp/a,b", "info block", "stop", "cont", "announce_self eth0 n1",
]  # fmt: skip
REQUESTS = [
    {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}},
    {"execute": "query-migrate", "id": {"a": [1, None]}},
    {"execute": "migrate", "arguments": {"uri": "tcp:127.0.0.1:1", "resume": False}},
    {
        "execute": "migrate",
        "arguments": {
            "channels": [
                {
                    "channel-type": "main",
                    "addr": {"transport": "socket", "type": "inet", "host": "::1", "port": "1"},
                }
            ]
        },
    },
    {
        "execute": "migrate-set-capabilities",
        "arguments": {"capabilities": [{"capability": "postcopy-ram", "state": True}]},
    },
    {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1 << 30, "downtime-limit": 5}},
    {"exec-oob": "migrate-pause", "id": "x"},
    {"execute": "migrate-incoming", "arguments": {"uri": "unix:/x", "exit-on-error": False}},
    {"execute": "stop"},
]  # fmt: skip
INNER = {"vmsd_name": "inner", "version": 1, "fields": [{"name": "x", "type": "uint16", "size": 2}]}
DEVICE = {
    "name": "timer",
    "instance_id": 0,
    "version": 2,
    "fields": [
        {"name": "a", "type": "uint32", "size": 4},
        {"name": "all", "type": "uint8", "size": 1, "array_len": 3},
        {"name": "one", "type": "uint8", "size": 1, "index": 0},
        {"name": "one", "type": "uint8", "size": 1, "index": 1},
        {"name": "s", "type": "struct", "size": 2, "struct": INNER},
    ],
    "subsections": [{**INNER, "vmsd_name": "timer/b"}],
}
STATE = bytes(11) + b"\x05\x07timer/b\0\0\0\x01\0\x09"
DESCRIPTION = {
    "page_size": 4096,
    "devices": [DEVICE, {"name": "apic", "instance_id": 1, "fields": []}],
}


def readers(folder: Path) -> Iterator[Reader]:
    """All of them."""
    del folder
    refused = (PostcopyError, QmpError)
    yield Reader("hmp", lambda chance: mutated(_LINES, chance), _hmp, refused, 8)
    yield Reader("json", lambda chance: mutated(_MESSAGES, chance), _json, refused, 10)
    yield Reader("qmp", _request, _qmp, refused, 8)
    yield Reader("description", _described, _description, (_DescriptionError,), 10)


_LINES = [line.encode() for line in LINES]
_MESSAGES = [json.dumps(each).encode() for each in REQUESTS] + [
    b"{'execute': 'query-\\u006digrate', \"id\": -1.5e3} [true, false, null]\n" * 2
]


def _hmp(raw: bytes) -> None:
    line = raw.decode(errors="surrogateescape")
    if WRITES_FILES in line:
        return
    backend = make_backend(MEMORY_BYTES)
    backend.migration.info = lambda: backend.migration.now
    answer = Hmp(backend, interactive=False).run(line)
    assert "internal error" not in answer, answer
    assert len(answer) < MOST_ANSWER_CHARACTERS


def _json(raw: bytes) -> None:
    stream = JsonStream()
    half = len(raw) // 2
    for piece in (raw[:half], raw[half:], b"\n"):
        for value in stream.feed(piece):
            if not isinstance(value, JsonError):
                json.dumps(value, allow_nan=False)
                _obey(value)


def _request(chance: random.Random) -> bytes:
    return json.dumps(mutated_json(REQUESTS, chance)).encode()


def _qmp(raw: bytes) -> None:
    for value in JsonStream().feed(raw + b"\n"):
        if isinstance(value, JsonError):
            raise QmpError("GenericError", str(value))
        _obey(value, quiet=False)


def _obey(value: object, *, quiet: bool = True) -> None:
    try:
        request = parse(value, out_of_band_allowed=True)
        command = QMP.get(request.command)
        if (
            command is not None
            and WRITES_FILES not in command.name
            and command.name != "human-monitor-command"
        ):
            command.run(make_backend(MEMORY_BYTES), command.arguments(request.arguments, ""))
    except (PostcopyError, QmpError):
        if not quiet:
            raise


class _DescriptionError(StreamError):
    """One that need not have an offset: the reader of the stream knows where the text is."""


def _described(chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return mutated([json.dumps(DESCRIPTION).encode()], chance)
    return json.dumps(mutated_json([DESCRIPTION], chance)).encode()


def _description(raw: bytes) -> None:
    try:
        parsed = parse_description(raw.decode(errors="replace"))
        DescribedFormats(parsed)
        for device in parsed["devices"]:
            length = described_bytes(device)
            assert length >= 0
            list(flatten(decode_state(device, STATE if device["name"] == "timer" else b"")))
    except StreamError as error:
        raise _DescriptionError(error.message, error.offset or 0) from error
