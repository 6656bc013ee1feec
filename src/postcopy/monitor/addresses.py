"""QAPI's ``MigrationAddress`` and ``SocketAddress``, to and from QEMU's URIs."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from postcopy.channel.address import tcp_uri
from postcopy.errors import Refused
from postcopy.monitor.argument_types import Struct, array, boolean, enumeration, size, string, union

_SOCKET: Mapping[str, Struct] = {
    "inet": Struct(
        {"host": string, "port": string},
        {"numeric": boolean, "to": size, "ipv4": boolean, "ipv6": boolean, "keep-alive": boolean},
    ),
    "unix": Struct({"path": string}, {"abstract": boolean, "tight": boolean}),
    "vsock": Struct({"cid": string, "port": string}),
    "fd": Struct({"str": string}),
}

MIGRATION_ADDRESS = union(
    "transport",
    {
        "socket": union("type", _SOCKET),
        "exec": Struct({"args": array(string)}),
        "rdma": Struct({"host": string, "port": string}),
        "file": Struct({"filename": string, "offset": size}),
    },
)
"""The ``addr`` of a migration channel."""

CHANNELS = array(
    Struct(
        {"channel-type": enumeration("main", "cpr"), "addr": MIGRATION_ADDRESS},
        name="MigrationChannel",
    )
)
"""The ``channels`` of ``migrate`` and ``migrate-incoming``."""


def uri_of_call(arguments: Mapping[str, Any]) -> str:
    """The one place that ``uri`` or ``channels`` name.

    :raises Refused: none of them, both, or not exactly one main channel.
    """
    uri, channels = arguments.get("uri"), arguments.get("channels")
    if (uri is None) == (not channels):
        raise Refused("need either 'uri' or 'channels' argument")
    return _main_channel(channels) if channels else uri or ""


def _main_channel(channels: Sequence[Mapping[str, Any]]) -> str:
    for kind in ("main", "cpr"):
        if sum(channel["channel-type"] == kind for channel in channels) > 1:
            raise Refused(f"Channel list has more than one {kind} entry")
    if any(channel["channel-type"] == "cpr" for channel in channels):
        raise Refused("Channel 'cpr' is not implemented by postcopy")
    return _uri_of_migration_address(channels[0]["addr"])


def _uri_of_migration_address(address: Mapping[str, Any]) -> str:
    match address["transport"]:
        case "socket":
            return uri_of_socket_address(address)
        case "rdma":
            return f"rdma:{address['host']}:{address['port']}"
        case "file":
            return f"file:{address['filename']},offset={address['offset']}"
    return f"exec:{_shell_command(address['args'])}"


def _shell_command(args: Sequence[str]) -> str:
    if not args:
        raise Refused("Parameter 'args' of an exec channel is empty")
    match args:
        case ["/bin/sh", "-c", command]:
            return command
    return shlex.join(args)


def uri_of_socket_address(address: Mapping[str, Any]) -> str:
    """A ``SocketAddress`` as HMP prints it and ``migrate`` takes it."""
    match address["type"]:
        case "inet":
            return tcp_uri(address["host"], address["port"])
        case "unix":
            return f"unix:{address['path']}"
        case "vsock":
            return f"vsock:{address['cid']}:{address['port']}"
    return f"fd:{address['str']}"
