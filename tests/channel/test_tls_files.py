"""QEMU's certificate files and priority strings, as they are read."""

import ssl

import pytest

from fakes.certificates import client, server
from postcopy.channel.address import TcpAddress
from postcopy.channel.tls_listener import TlsListener
from postcopy.channel.tls_session import context_for
from postcopy.errors import Refused


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_missing_file_is_named_before_anything_listens(certificates, name):
    there = certificates.host(days=35)
    (there / name).unlink()
    with pytest.raises(Refused, match=rf"Unable to access credentials .*{name}: No such file"):
        TlsListener(TcpAddress("127.0.0.1", 0), server(there))


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem"])
def test_a_file_that_is_none_is_named(certificates, name):
    there = certificates.host(days=36)
    (there / name).write_text("nothing")
    with pytest.raises(Refused, match=r"unusable for TLS"):
        context_for(server(there))


def test_a_key_of_another_certificate_is_refused(certificates):
    there = certificates.host(days=37)
    (there / "client-key.pem").write_bytes((there / "server-key.pem").read_bytes())
    with pytest.raises(Refused, match="key values mismatch"):
        context_for(client(there))


@pytest.mark.parametrize(
    ("priority", "versions"),
    [
        ("NORMAL", (12, 13)),
        ("SECURE256:-VERS-TLS1.3", (12, 12)),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.3", (13, 13)),
        ("NORMAL:-VERS-TLS1.0", (12, 13)),
    ],
)
def test_a_priority_chooses_versions(tls_host, priority, versions):
    context = context_for(client(tls_host, priority=priority))
    named = {12: ssl.TLSVersion.TLSv1_2, 13: ssl.TLSVersion.TLSv1_3}
    found = (context.minimum_version, context.maximum_version)
    assert found == tuple(named[each] for each in versions)


@pytest.mark.parametrize(
    "priority", ["NONE", "NORMAL:-AES-128-GCM", "NORMAL:-VERS-ALL", "NORMAL:x"]
)
def test_a_priority_that_openssl_has_not_is_refused(tls_host, priority):
    with pytest.raises(Refused, match="priority"):
        context_for(client(tls_host, priority=priority))
