"""Whatever comes in at a monitor is answered, and never by an error of ours."""

import contextlib
import json

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from fakes.monitor_backend import make_backend
from postcopy.errors import CannotListen, PostcopyError, Refused
from postcopy.monitor.hmp import COMMANDS as HMP
from postcopy.monitor.hmp import Hmp
from postcopy.monitor.json_stream import JsonError, JsonStream
from postcopy.monitor.qmp_session import COMMANDS as QMP
from postcopy.monitor.qmp_session import QmpError, parse
from postcopy.monitor.server import serve_qmp
from postcopy.parameters import Parameters

MANY = "9" * 5000
NAMES = sorted(set(HMP) - {"quit", "q", "c", "pmemsave"})
ODD_WORDS = st.sampled_from(
    ["", "0", "-1", MANY, f"0x{MANY}", f"1.{MANY}k", f"/{MANY}xb", "/2147483647xg", "nan", "1e999",
     "\0", "\udcff", "\U0001f600", "(" * 200, "~" * 200, "1+" * 40000, "'", "on", *HMP,
     *Parameters().to_qapi()]
)  # fmt: skip
LINES = st.tuples(st.sampled_from(NAMES), st.lists(ODD_WORDS | st.text(max_size=9), max_size=4))


@given(LINES)
@example(("xp", [f"/{MANY}xb", "0"]))
@example(("xp", ["/2147483647xg", "0"]))
@example(("xp", [MANY]))
@example(("migrate_set_parameter", ["announce-max", MANY]))
def test_any_line_gets_an_answer(line):
    backend = make_backend()
    backend.migration.info = lambda: backend.migration.now
    name, words = line
    text = Hmp(backend, interactive=False).run(" ".join([name, *words]))
    assert "internal error" not in text
    assert len(text) < 100 << 20


@given(st.lists(st.binary(max_size=40), max_size=8))
@example([b'"' + b"\\" * 40 + b'"'])
@example([b"-" + b"9" * 5000 + b" "])
@example([b"1e999 -1e999 1" + b"0" * 400 + b".5 "])
def test_any_bytes_are_values_or_complaints(pieces):
    stream = JsonStream()
    for piece in pieces:
        for value in stream.feed(piece):
            if not isinstance(value, JsonError):
                json.dumps(value, allow_nan=False).encode()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9).filter(lambda text: text.isprintable())
    | st.sampled_from(["", "\0", "/x\0y", "tcp:\0:1", "x" * 5000, "main", "socket", "inet", "on"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


NOT_HERE = {"quit", "human-monitor-command", "pmemsave"}  # the last writes files


@st.composite
def requests(draw):
    command = QMP[draw(st.sampled_from(sorted(set(QMP) - NOT_HERE)))]
    members = {**command.arguments.required, **command.arguments.optional}
    known = st.dictionaries(st.sampled_from(sorted(members) or ["x"]), VALUES, max_size=4)
    return {"execute": command.name, "arguments": draw(known | VALUES)}


@given(requests() | VALUES)
def test_any_request_is_done_or_refused_by_name(message):
    with contextlib.suppress(PostcopyError, QmpError):
        request = parse(message, out_of_band_allowed=True)
        if (command := QMP.get(request.command)) is not None:
            command.run(make_backend(), command.arguments(request.arguments, ""))


@pytest.mark.parametrize(
    "name", ["", "\0", "a\0b", "x" * 5000, "/", "/no/such/folder/x", "\udcff/x"]
)
def test_files_that_cannot_be_are_named(name):
    order = {"val": 0, "size": 1, "filename": name}
    with pytest.raises(Refused, match="Could not open"):
        QMP["pmemsave"].run(make_backend(), order)


@pytest.mark.parametrize(
    "address",
    ["tcp:127.0.0.1:65536", "tcp:127.0.0.1:" + MANY, "tcp:\udcff:80", "tcp:a..b:80",
     f"tcp:{'x' * 300}:80", "tcp:\0:80", "unix:/tmp/a\0b", "unix:/no/such/folder/x",
     f"unix:/tmp/{'x' * 300}", "unix:", "tcp:80", "tcp:x:", "\udcff"],
)  # fmt: skip
def test_addresses_that_cannot_be_are_named(address):
    with pytest.raises((CannotListen, Refused), match=r"address|cannot listen"):
        serve_qmp(address, make_backend())
