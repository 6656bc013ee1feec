"""The objects that a user makes: TLS credentials, and which sources may connect.

Source: QEMU's ``object-add`` and ``--object`` (``qapi/qom.json``), for the kinds in :data:`KINDS`.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from postcopy.errors import HostCannot, Refused
from postcopy.parameters import Parameters
from postcopy.tls_options import Authorization, AuthorizationRule, TlsOptions

KINDS: Final = ("tls-creds-x509", "tls-creds-psk", "authz-simple", "authz-list")
_ENDPOINTS: Final = ("client", "server")
_MOST_OBJECTS: Final = 1000
_MOST_RULES: Final = 1000


@dataclass(frozen=True, slots=True)
class _Credentials:
    options: TlsOptions


class UserObjects:
    """The objects of one guest's process, by their names; any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Under the lock.
        self._objects: dict[str, _Credentials | Authorization] = {}

    def add(self, kind: str, name: str, properties: Mapping[str, Any]) -> None:
        """Make an object; its files are read now, to say at once what is wrong with them.

        :param properties: as QMP has them.
        :raises Refused: in QEMU's words where it refuses, too.
        """
        made = _MAKERS[kind](dict(properties))
        with self._lock:
            if name in self._objects:
                raise Refused(
                    f"attempt to add duplicate property '{name}' to object (type 'container')"
                )
            if len(self._objects) >= _MOST_OBJECTS:
                raise Refused(f"there are {_MOST_OBJECTS} objects; delete some (object-del)")
            self._objects[name] = made

    def remove(self, name: str) -> None:
        """Forget an object; a migration that has begun with it goes on with it.

        :raises Refused: there is none of this name.
        """
        with self._lock:
            if self._objects.pop(name, None) is None:
                raise Refused(f"object '{name}' not found")

    def tls(self, parameters: Parameters, *, incoming: bool) -> TlsOptions | None:
        """What the parameters ``tls-creds``, ``tls-hostname`` and ``tls-authz`` mean for a migration.

        :return: None: it is not encrypted.
        :raises Refused: in QEMU's words: there are no such objects, or they are of another kind or side.
        """
        name = parameters.tls_creds
        if not name:
            return None
        with self._lock:
            found = self._objects.get(name)
            authorization = self._objects.get(parameters.tls_authz)
        if found is None:
            raise Refused(f"No TLS credentials with id '{name}'")
        if not isinstance(found, _Credentials):
            raise Refused(f"Object with id '{name}' is not TLS credentials")
        if found.options.is_server != incoming:
            side = _ENDPOINTS[incoming]
            raise Refused(
                f"Expected TLS credentials for a {side} endpoint; '{name}' is for the other"
            )
        options = replace(found.options, hostname=parameters.tls_hostname)
        if not incoming or not parameters.tls_authz:
            return options
        if not isinstance(authorization, Authorization):
            raise Refused(f"No authorization object with id '{parameters.tls_authz}' (tls-authz)")
        if not options.verify_peer:
            raise Refused(
                f"tls-authz needs the sources' certificates, and '{name}' has verify-peer off; set it on"
            )
        return replace(options, authorization=authorization)


def _x509(properties: dict[str, Any]) -> _Credentials:
    # `ssl` takes long to import, and most guests have no TLS.
    from postcopy.channel.tls_session import context_for

    if properties.get("passwordid"):
        raise Refused("passwordid: keys with a password are not read; decrypt the key")
    folder = properties.get("dir")
    if not folder:
        raise Refused("Missing 'dir' property value")
    options = TlsOptions(
        directory=str(Path(folder).absolute()),
        is_server=properties.get("endpoint", "client") == "server",
        verify_peer=properties.get("verify-peer", True),
        priority=properties.get("priority", ""),
    )
    context_for(options)
    return _Credentials(options)


def _psk(_: dict[str, Any]) -> _Credentials:
    version = ".".join(map(str, sys.version_info[:2]))
    raise HostCannot(
        "tls-creds-psk: postcopy's TLS has certificates only (Python's ssl module knows pre-shared keys "
        f"since 3.13, and postcopy needs no more than 3.11; this is {version})",
        "use certificates: tls-creds-x509 and 'postcopy tls init'",
    )


def _simple(properties: dict[str, Any]) -> Authorization:
    return Authorization((AuthorizationRule(properties["identity"], allow=True),))


def _list(properties: dict[str, Any]) -> Authorization:
    rules = properties.get("rules", [])
    if len(rules) > _MOST_RULES:
        raise Refused(f"rules: {len(rules)} are more than {_MOST_RULES}")
    return Authorization(
        tuple(
            AuthorizationRule(
                rule["match"], rule["policy"] == "allow", rule.get("format", "exact") == "glob"
            )
            for rule in rules
        ),
        allow=properties.get("policy", "deny") == "allow",
    )


_MAKERS: Final[dict[str, Callable[[dict[str, Any]], _Credentials | Authorization]]] = {
    "tls-creds-x509": _x509,
    "tls-creds-psk": _psk,
    "authz-simple": _simple,
    "authz-list": _list,
}
