"""QEMU's URIs: what they mean, what is refused, and in which words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.channel import address as uris
from postcopy.channel.address import (
    ExecAddress,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
    parse,
)
from postcopy.errors import Refused


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:127.0.0.1:4444", TcpAddress("127.0.0.1", 4444)),
        ("tcp:[::1]:4444", TcpAddress("::1", 4444)),
        ("tcp:0:4444", TcpAddress("0", 4444)),
        ("tcp::0", TcpAddress("", 0)),
        ("unix:/run/a b:c", UnixAddress("/run/a b:c")),
        ("fd:7", FdAddress(7)),
        ("fd:migration", FdAddress("migration")),
        ("file:/tmp/x", FileAddress("/tmp/x")),
        ("exec:cat > /dev/null; exit 0", ExecAddress("cat > /dev/null; exit 0")),
    ],
)
def test_uri_and_back(uri, address):
    assert parse(uri) == address
    assert str(address) == uri


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("0x1000", 4096),
        ("4k", 4096),
        ("2M", 1 << 21),
        ("1G", 1 << 30),
        ("1.5k", 1536),
        ("1P", 1 << 50),
    ],
)
def test_offsets(text, n_bytes):
    address = parse(f"file:/a,b,offset={text}")
    assert address == FileAddress("/a,b", n_bytes)
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("bad:1", "unknown migration protocol: bad:1"),
        ("nonsense", "unknown migration protocol: nonsense"),
        ("", "unknown migration protocol: "),
        ("tcp:", "error parsing address ''"),
        ("tcp:127.0.0.1", "error parsing address '127.0.0.1'"),
        ("tcp:127.0.0.1:99999", "error parsing address '127.0.0.1:99999'"),
        ("tcp:127.0.0.1:-1", "error parsing address '127.0.0.1:-1'"),
        ("tcp:::1:4444", "error parsing address '::1:4444'"),
        ("unix:", "invalid Unix socket address"),
        ("unix:/" + "a" * 107, "is too long"),
        ("unix:/a\0b", "a zero byte in the address"),
        ("fd:", "Invalid file descriptor number ''"),
        ("file:x,offset=0x20M", "file URI has bad offset 0x20M: Invalid argument"),
        ("file:x,offset=abc", "file URI has bad offset abc: Invalid argument"),
        ("file:x,offset=-1", "file URI has bad offset -1: Numerical result out of range"),
        ("file:x,offset=16E", "file URI has bad offset 16E: Numerical result out of range"),
        ("file:x,offset=1.5", "file URI has bad offset 1.5: Invalid argument"),
        ("file:x,offset=", "file URI has bad offset : Invalid argument"),
        ("file:x,offset=0x8000000000000000", "Numerical result out of range"),
        ("file:", "file URI has no path"),
        ("exec:", "exec URI has no command"),
    ],
)
def test_refused(uri, error):
    with pytest.raises(Refused) as refused:
        parse(uri)
    assert error in str(refused.value)
    assert "\n" not in str(refused.value)


def test_qapi_addresses_are_what_query_migrate_says():
    assert parse("tcp:[::1]:4444").to_qapi() == {"type": "inet", "host": "::1", "port": "4444"}
    assert parse("unix:/a").to_qapi() == {"type": "unix", "path": "/a"}
    assert parse("fd:7").to_qapi() == {"type": "fd", "str": "7"}
    assert parse("file:/a").to_qapi() is None
    assert parse("exec:true").to_qapi() is None


def test_a_named_descriptor_has_no_number():
    assert FdAddress(7).number == 7
    with pytest.raises(Refused, match="File descriptor named 'mig' has not been found"):
        _ = FdAddress("mig").number


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text):
    for prefix in ("", "tcp:", "unix:", "fd:", "file:", "exec:"):
        try:
            address = uris.parse(prefix + text)
        except Refused:
            continue
        assert uris.parse(str(address)) == address
