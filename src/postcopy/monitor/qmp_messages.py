"""QMP's messages: what a request must look like, what greeting, answer and complaint look like."""

from dataclasses import dataclass
from typing import Any

from postcopy.errors import Reason
from postcopy.monitor import version

_NO_ID = object()


class QmpError(Exception):
    """What the client gets instead of an answer."""

    def __init__(
        self, description: str, error_class: str = "GenericError", reason: Reason | None = None
    ) -> None:
        super().__init__(description)
        self.error_class = error_class
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request; ``id`` comes back with the answer."""

    command: str
    arguments: dict[str, Any]
    out_of_band: bool


def greeting() -> dict[str, Any]:
    """The first message to a client."""
    return {"QMP": {"version": version.query_version(), "capabilities": ["oob"]}}


def parse(message: object, *, out_of_band_allowed: bool) -> Request:
    """What a client's ``message`` asks for.

    :raises QmpError: in QEMU's words.
    """
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    execute = ("execute", "exec-oob") if out_of_band_allowed else ("execute",)
    asked: list[str] = []
    for name, value in message.items():
        if name in execute:
            if not isinstance(value, str):
                raise QmpError(f"QMP input member '{name}' must be a string")
            asked.append(name)
        elif name == "arguments":
            if not isinstance(value, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise QmpError(f"QMP input member '{name}' is unexpected")
    if not asked:
        raise QmpError("QMP input lacks member 'execute'")
    if len(asked) > 1:
        raise QmpError(f"QMP input member '{asked[1]}' clashes with '{asked[0]}'")
    arguments = message.get("arguments", {})
    return Request(message[asked[0]], arguments, out_of_band=asked[0] == "exec-oob")


def answered(message: object, result: object) -> dict[str, Any]:
    """The answer to ``message``; a command that returns nothing returns ``{}``."""
    return {"return": {} if result is None else result} | _id_of(message)


def failed(message: object, error: QmpError) -> dict[str, Any]:
    """The complaint about ``message``."""
    said = {"class": error.error_class, "desc": str(error)}
    if error.reason is not None:
        said["x-reason"] = error.reason.value
    return {"error": said} | _id_of(message)


def _id_of(message: object) -> dict[str, Any]:
    identity = message.get("id", _NO_ID) if isinstance(message, dict) else _NO_ID
    return {} if identity is _NO_ID else {"id": identity}
