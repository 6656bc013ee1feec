"""Encrypted channels: what they carry, and whom they refuse."""

import contextlib
import os
import select
import socket
import ssl
import threading
from contextlib import ExitStack

import numpy as np
import pytest

from fakes.certificates import client, server
from fakes.waiting import wait_until
from postcopy.channel import tls_channel
from postcopy.channel.address import FdAddress, TcpAddress, UnixAddress
from postcopy.channel.connect import connect
from postcopy.channel.tls_channel import secure
from postcopy.channel.tls_listener import MOST_HANDSHAKES, TlsListener
from postcopy.channel.tls_session import context_for
from postcopy.errors import CannotConnect, ChannelBroken, Refused
from postcopy.tls_options import Authorization, AuthorizationRule

MIB = 1 << 20


class Said(list):
    """What a listener has told its user."""

    def __call__(self, text):
        self.append(text)


@pytest.fixture
def said():
    return Said()


@pytest.fixture
def listening(tls_host, said):
    with TlsListener(TcpAddress("127.0.0.1", 0), server(tls_host), said) as listener:
        yield listener


def opened(listener, options, host="127.0.0.1"):
    return secure(connect(listener.addresses[0], timeout_s=10), options, host)


def raw(listener):
    return socket.create_connection(listener.addresses[0].endpoint, timeout=10)


def to_door(door, folder):
    near = connect(TcpAddress("127.0.0.1", door.getsockname()[1]))
    return secure(near, client(folder), "localhost")


@pytest.fixture
def pair(listening, tls_host):
    near = opened(listening, client(tls_host))
    with near, listening.accept(10) as far:
        yield near, far


def received(channel, n_bytes, room=4 * MIB):
    """So many bytes, asked for in pieces of ``room``."""
    data = bytearray()
    view = memoryview(bytearray(room))
    while len(data) < n_bytes:
        count = channel.receive_into(view)
        assert count, "the stream has ended"
        data += view[:count]
    return bytes(data)


def in_background(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def reading(channel):
    found = []
    view = memoryview(bytearray(4096))

    def read():
        try:
            found.append(channel.receive_into(view))
        except ChannelBroken as broken:
            found.append(str(broken))

    return in_background(read), found


# --- what it carries


def test_bytes_go_both_ways_and_are_counted_as_they_were_given(pair):
    near, far = pair
    assert near.encrypted
    assert near.can_return
    near.send_many([b"he", bytearray(b"l"), b"", memoryview(b"lo")])
    assert received(far, 5) == b"hello"
    far.send(b"world")
    assert received(near, 5) == b"world"
    assert (near.sent_bytes, far.received_bytes, near.received_bytes) == (5, 5, 5)


@pytest.mark.parametrize("room", [1, 1000, 16384, 300_000])
def test_nothing_is_lost_whatever_room_the_reader_has(pair, room):
    near, far = pair
    data = os.urandom(40_000 if room == 1 else 700_001)
    thread = in_background(lambda: near.send(data))
    assert received(far, len(data), room) == data
    thread.join()


def test_many_pieces_of_memory_arrive_in_order(pair):
    near, far = pair
    memory = np.frombuffer(os.urandom(8 * MIB), np.uint8)
    pieces = np.empty((3000, 2), np.uint64)
    starts = np.random.default_rng(1).integers(0, 8 * MIB - 5000, 3000)
    lengths = np.random.default_rng(2).integers(1, 5000, 3000)
    pieces[:, 0], pieces[:, 1] = memory.ctypes.data + starts, lengths
    expected = b"".join(
        memory[s : s + n].tobytes() for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)
    )
    before = pieces.copy()
    thread = in_background(lambda: near.send_gathered(pieces))
    assert received(far, len(expected)) == expected
    thread.join()
    assert (pieces == before).all()


def test_a_page_that_is_lost_is_an_error_and_nothing_of_it_goes_out(pair):
    near, far = pair
    pieces = np.array([[4096, 4096]], np.uint64)  # no page is there
    with pytest.raises(ChannelBroken):
        near.send_gathered(pieces)
    thread, found = reading(far)
    near.shutdown()
    near.close()
    thread.join()
    assert "cut" in found[0]


def test_a_blocked_writer_does_not_block_the_reader_and_the_reverse(pair):
    near, far = pair
    big = bytes(64 * MIB)
    thread = in_background(lambda: near.send(big))
    wait_until(near.pending_output)
    far.send(b"a page is wanted")
    assert received(near, 16) == b"a page is wanted"
    assert received(far, len(big)) == big
    thread.join()
    thread, found = reading(near)
    near.send(b"while the reader waits")
    assert received(far, 22) == b"while the reader waits"
    far.send(b"!")
    thread.join()
    assert found == [1]


def test_a_reader_that_polls_is_told_of_what_is_decrypted_already(pair):
    near, far = pair
    far.send(b"0123456789")
    view = memoryview(bytearray(4))
    received_bytes = b""
    poll = select.poll()
    for fd in near.input_fds:
        poll.register(fd, select.POLLIN)
    while len(received_bytes) < 10:
        assert poll.poll(10_000)
        if count := near.receive_ready_into(view):
            received_bytes += view[:count]
    assert received_bytes == b"0123456789"
    assert not poll.poll(0)


# --- TLS of other kinds: a plain OpenSSL at the other end


def openssl(listener, tls_host, **settings):
    """A client of Python's own, whose session the test can misuse."""
    context = ssl.create_default_context(cafile=tls_host / "ca-cert.pem")
    context.load_cert_chain(tls_host / "client-cert.pem", tls_host / "client-key.pem")
    for name, value in settings.items():
        setattr(context, name, value)
    return context.wrap_socket(raw(listener), server_hostname="localhost")


def test_a_stream_that_is_cut_is_no_end(listening, tls_host):
    with openssl(listening, tls_host) as peer, listening.accept(10) as far:
        peer.sendall(b"page")
        assert received(far, 4) == b"page"
        os.close(peer.detach())
        with pytest.raises(ChannelBroken, match="cut, without the close_notify"):
            far.receive_into(memoryview(bytearray(10)))


def test_close_notify_is_an_end(pair):
    near, far = pair
    near.send(b"last")
    near.close()
    assert received(far, 4) == b"last"
    assert far.receive_into(memoryview(bytearray(10))) == 0
    assert far.receive_into(memoryview(bytearray(10))) == 0


def test_a_broken_channel_does_not_claim_to_end(pair):
    near, far = pair
    near.shutdown()
    near.close()
    with pytest.raises(ChannelBroken, match="cut"):
        far.receive_into(memoryview(bytearray(10)))


def test_a_changed_byte_ends_the_session(listening, tls_host):
    listener = socket.create_server(("127.0.0.1", 0))
    near_end = socket.create_connection(listener.getsockname())
    middle, _ = listener.accept()
    out = raw(listening)
    listener.close()
    changed = []

    def forward(source, to, flip):
        with source, to:
            while data := bytearray(source.recv(65536)):
                if flip and changed:
                    data[-1] ^= 1
                to.sendall(data)

    threads = [
        in_background(lambda: forward(middle, out.dup(), flip=True)),
        in_background(lambda: forward(out, middle.dup(), flip=False)),
    ]
    near = secure(connect(FdAddress(near_end.detach())), client(tls_host), "localhost")
    with near, listening.accept(10) as far:
        near.send(b"good")
        assert received(far, 4) == b"good"
        changed.append(True)
        near.send(b"evil")
        with pytest.raises(ChannelBroken, match="TLS failed"):
            far.receive_into(memoryview(bytearray(10)))
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_both_versions_of_tls_work(listening, tls_host, version):
    wanted = getattr(ssl.TLSVersion, version)
    with openssl(listening, tls_host, maximum_version=wanted) as peer, listening.accept(10) as far:
        assert peer.version() == version.replace("v1_", "v1.")
        far.send(b"x")
        assert peer.recv(1) == b"x"


def test_session_tickets_wake_no_reader_in_vain(tls_host):
    """A server that sends them makes the socket readable, with nothing to read."""
    context = context_for(server(tls_host))
    context.num_tickets = 4
    with socket.create_server(("127.0.0.1", 0)) as door, ExitStack() as stack:
        found = []
        thread = in_background(
            lambda: found.append(context.wrap_socket(door.accept()[0], server_side=True))
        )
        near = stack.enter_context(to_door(door, tls_host))
        thread.join()
        peer = stack.enter_context(found[0])
        view = memoryview(bytearray(10))
        wait_until(lambda: near.receive_ready_into(view) is None)
        peer.sendall(b"word")
        assert received(near, 4) == b"word"


# --- whom it refuses


def refused(listening, said, options, host="127.0.0.1"):
    """Why; the source may find out only when it reads."""
    try:
        with opened(listening, options, host) as near:
            near.receive_into(memoryview(bytearray(10)))
    except (CannotConnect, ChannelBroken) as error:
        wait_until(lambda: said)
        with pytest.raises(TimeoutError):
            listening.accept(0)
        return str(error)
    raise AssertionError("it was not refused")


def test_a_foreign_certificate_of_a_source_is_refused_by_name(listening, said, certificates):
    text = refused(listening, said, client(certificates.foreign()))
    assert "the peer refuses this side's TLS: " in text
    assert "the peer's certificate is refused" in said[0]
    assert "127.0.0.1" in said[0]


def test_an_expired_certificate_of_a_source_is_refused_by_name(listening, said, certificates):
    text = refused(listening, said, client(certificates.host(days=-1)))
    assert "certificate expired" in text
    assert "certificate has expired" in said[0]


def test_a_source_without_a_certificate_is_refused_by_name(listening, said, certificates):
    bare = certificates.host(days=31)
    (bare / "client-cert.pem").unlink()
    (bare / "client-key.pem").unlink()
    assert "certificate required" in refused(listening, said, client(bare))
    assert "peer did not return a certificate" in said[0]


@pytest.mark.parametrize(
    ("of_server", "why"),
    [
        (lambda made: made.foreign(), "unable to get local issuer|self-signed|signature failure"),
        (lambda made: made.host(days=-1), "certificate has expired"),
        (lambda made: made.host("elsewhere.example"), "IP address mismatch"),
    ],
    ids=["foreign", "expired", "another-host"],
)
def test_a_wrong_certificate_of_a_destination_is_refused(
    certificates, tls_host, said, of_server, why
):
    with TlsListener(TcpAddress("127.0.0.1", 0), server(of_server(certificates)), said) as listener:
        with pytest.raises(CannotConnect, match=why):
            opened(listener, client(tls_host))
        wait_until(lambda: said)


def test_the_host_name_can_be_given(certificates, tls_host, tmp_path):
    there = certificates.host("elsewhere.example")
    with TlsListener(UnixAddress(str(tmp_path / "s")), server(there)) as listener:
        options = client(tls_host, hostname="elsewhere.example")
        with opened(listener, options, host="") as near, listener.accept(10) as far:
            near.send(b"x")
            assert received(far, 1) == b"x"
        with pytest.raises(Refused, match="set tls-hostname"):
            opened(listener, client(tls_host), host="")


def test_nothing_is_verified_where_the_user_says_so(certificates, tls_host):
    foreign = certificates.foreign()
    options = server(foreign, verify_peer=False)
    with (
        TlsListener(TcpAddress("127.0.0.1", 0), options) as listener,
        opened(listener, client(tls_host, verify_peer=False)) as near,
    ):
        near.send(b"x")
        with listener.accept(10) as far:
            assert received(far, 1) == b"x"


def test_a_revoked_certificate_is_refused(certificates, tls_host, said):
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    there = certificates.host(days=33)
    pem = (tls_host / "client-cert.pem").read_bytes()
    serial = x509.load_pem_x509_certificate(pem).serial_number
    now = dt.datetime.now(dt.UTC)
    revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    builder = x509.CertificateRevocationListBuilder(
        certificates.authority.certificate.subject, now, now + dt.timedelta(days=1)
    ).add_revoked_certificate(revoked)
    signed = builder.sign(certificates.authority.key, hashes.SHA256())
    (there / "ca-crl.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    with TlsListener(TcpAddress("127.0.0.1", 0), server(there), said) as listener:
        assert "revoked" in refused(listener, said, client(tls_host))
        assert "certificate revoked" in said[0]


def test_only_the_sources_that_are_named_may_connect(certificates, tls_host, said):
    may = Authorization((AuthorizationRule("CN=local*", allow=True, glob=True),))
    with TlsListener(
        TcpAddress("127.0.0.1", 0), server(tls_host, authorization=may), said
    ) as listener:
        with opened(listener, client(tls_host)), listener.accept(10):
            pass
        refused(listener, said, client(certificates.host("other.example")))
        assert "TLS x509 authz check for CN=other.example is denied" in said[0]


def test_a_plain_source_is_refused_by_name_and_others_are_not_held_up(listening, said, tls_host):
    with raw(listening) as plain:
        plain.sendall(b"QEVM" + bytes(1000))
        wait_until(lambda: said)
        assert "the peer speaks no TLS; set tls-creds there too" in said[0]
        with opened(listening, client(tls_host)) as near, listening.accept(10) as far:
            near.send(b"x")
            assert received(far, 1) == b"x"


def test_a_plain_destination_is_refused_by_name(tls_host):
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer():
            with door.accept()[0] as taken:
                taken.sendall(b"QEVM")

        thread = in_background(answer)
        with pytest.raises(CannotConnect, match="the peer speaks no TLS"):
            to_door(door, tls_host)
        thread.join()


def test_a_destination_that_closes_at_once_is_named(tls_host):
    with socket.create_server(("127.0.0.1", 0)) as door:

        def close():
            door.accept()[0].close()

        thread = in_background(close)
        with pytest.raises(CannotConnect, match="see that tls-creds is set there"):
            to_door(door, tls_host)
        thread.join()


def test_channels_come_in_the_order_in_which_they_have_connected(listening, tls_host):
    """The first one's handshake has begun, and ends after that of the second."""
    context = ssl.create_default_context(cafile=tls_host / "ca-cert.pem")
    context.load_cert_chain(tls_host / "client-cert.pem", tls_host / "client-key.pem")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    first = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with raw(listening) as plain:
        with pytest.raises(ssl.SSLWantReadError):
            first.do_handshake()
        plain.sendall(outgoing.read())
        incoming.write(plain.recv(65536))
        with opened(listening, client(tls_host)) as second:
            second.send(b"second")
            while True:
                try:
                    first.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    incoming.write(plain.recv(65536))
            first.write(b"first!")
            plain.sendall(outgoing.read())
            with listening.accept(10) as one, listening.accept(10) as two:
                assert (received(one, 6), received(two, 6)) == (b"first!", b"second")


@pytest.mark.parametrize("begins", [b"", b"\x16\x03\x01\x02\x00"], ids=["silent", "half-hello"])
def test_a_peer_that_stalls_in_its_handshake_is_given_up(
    listening, said, tls_host, begins, monkeypatch
):
    monkeypatch.setattr(tls_channel, "HANDSHAKE_S", 0.3)
    with raw(listening) as stalled:
        stalled.sendall(begins)
        near = opened(listening, client(tls_host))  # meanwhile others come
        with near, listening.accept(10):
            pass
        wait_until(lambda: said)
        assert "the peer took longer than 0.3 s" in said[0]
        assert stalled.recv(10) == b""


def test_a_destination_that_stalls_is_given_up(tls_host, monkeypatch):
    assert tls_channel.HANDSHAKE_S < 5
    monkeypatch.setattr(tls_channel, "HANDSHAKE_S", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0)) as door,
        pytest.raises(CannotConnect, match=r"took longer than 0\.3 s"),
    ):
        to_door(door, tls_host)


def test_a_handshake_has_a_bound(listening, said):
    """Records of a handshake that never ends, faster than any clock."""
    with raw(listening) as endless:
        record = b"\x16\x03\x01\x40\x00" + b"\x01\x00\xff\xff" + bytes(0x4000 - 4)
        with contextlib.suppress(OSError):
            for _ in range(1000):
                endless.sendall(record)
        wait_until(lambda: said)


def test_too_many_handshakes_are_refused(listening, said, tls_host):
    with ExitStack() as stack:
        for _ in range(MOST_HANDSHAKES + 1):
            stack.enter_context(raw(listening))
        wait_until(lambda: said)
        assert "too many TLS handshakes" in said[0]


def test_closing_ends_the_handshakes(listening):
    with raw(listening) as stalled:
        wait_until(lambda: any(t.name == "tls-handshake" for t in threading.enumerate()))
        listening.close()
        with pytest.raises(ChannelBroken):
            listening.accept()
        assert stalled.recv(1) == b""
    assert not [t for t in threading.enumerate() if t.name.startswith("tls-")]
