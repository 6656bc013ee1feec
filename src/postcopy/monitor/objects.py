"""The arguments of ``object-add``, and the text from which HMP and the command line make them."""

import json
from typing import Any, Final

from postcopy.errors import Refused
from postcopy.monitor.argument_types import Arguments, Struct, array, boolean, enumeration, string
from postcopy.monitor.command import Command, Human
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_arguments import Argument, rest_of_line, word

_ENDPOINT: Final = enumeration("client", "server", name="QCryptoTLSCredsEndpoint")
_POLICY: Final = enumeration("deny", "allow", name="QAuthZListPolicy")
_FORMAT: Final = enumeration("exact", "glob", name="QAuthZListFormat")
_RULE: Final = Struct(
    {"match": string, "policy": _POLICY}, {"format": _FORMAT}, name="QAuthZListRule"
)
_CREDENTIALS: Final = {
    "dir": string,
    "endpoint": _ENDPOINT,
    "verify-peer": boolean,
    "priority": string,
}

OBJECT: Final = Struct(
    {
        "qom-type": enumeration("tls-creds-x509", "tls-creds-psk", "authz-simple", "authz-list"),
        "id": string,
    },
    tag="qom-type",
    branches={
        "tls-creds-x509": Struct(
            optional=_CREDENTIALS | {"sanity-check": boolean, "passwordid": string}
        ),
        "tls-creds-psk": Struct(optional=_CREDENTIALS | {"username": string}),
        "authz-simple": Struct({"identity": string}),
        "authz-list": Struct(optional={"policy": _POLICY, "rules": array(_RULE)}),
    },
)
"""Source: QEMU's ``qapi/qom.json``, ``qapi/crypto.json`` and ``qapi/authz.json``."""

_SWITCHES: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}


def add(backend: Backend, arguments: Arguments) -> None:
    """Make the object of ``object-add``."""
    rest = {name: value for name, value in arguments.items() if name not in {"qom-type", "id"}}
    backend.migration.objects.add(arguments["qom-type"], arguments["id"], rest)


def of_line(line: Arguments) -> Arguments:
    """The arguments of ``object-add`` for a line of HMP.

    :raises Refused: the text is no object.
    """
    return OBJECT(parse_object(line["object"]), "")


def parse_object(text: str) -> dict[str, Any]:
    """The arguments of ``object-add`` for ``KIND,id=NAME,KEY=VALUE``, or for JSON.

    A comma in a value is written twice; ``rules.0.match=NAME`` is the first element of a list.

    :raises Refused: neither of the two.
    """
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise Refused(f"--object: JSON expected: {error}") from error
        return dict(found)
    kind, *members = text.replace(",,", "\0").split(",")
    arguments: dict[str, Any] = {"qom-type": kind.removeprefix("qom-type=")}
    for member in members:
        key, equals, value = member.partition("=")
        if not equals:
            raise Refused(f"'{member}' is no KEY=VALUE in the object '{text}'")
        _set(arguments, key.split("."), value.replace("\0", ","))
    return {key: _value(value) for key, value in arguments.items()}


def _set(into: dict[str, Any], path: list[str], value: str) -> None:
    for part in path[:-1]:
        inner = into.setdefault(part, {})
        if not isinstance(inner, dict):
            raise Refused(f"'{'.'.join(path)}' is given in two ways")
        into = inner
    switched = _SWITCHES.get(value)
    into[path[-1]] = value if switched is None or path[-1] in {"id", "dir"} else switched


def _value(value: Any) -> Any:
    """Lists for members that are numbered from 0 on."""
    if not isinstance(value, dict):
        return value
    if sorted(value) == sorted(map(str, range(len(value)))):
        return [_value(value[str(number)]) for number in range(len(value))]
    return {key: _value(each) for key, each in value.items()}


COMMANDS = (
    Command(
        "object-add", "make TLS credentials, or say which sources may connect", add, OBJECT,
        Human(arguments=(Argument("object", rest_of_line, "object"),), members=of_line),
    ),
    Command(
        "object-del", "forget an object",
        lambda b, a: b.migration.objects.remove(a["id"]), Struct({"id": string}),
        Human(arguments=(Argument("id", word),)),
    ),
)  # fmt: skip
"""Those about the objects of a user."""
