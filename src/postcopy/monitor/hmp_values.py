"""Values of parameters as people type them: ``1.5G``, ``0x10``, ``on``."""

import re
import shlex
from collections.abc import Iterable

from postcopy.errors import Refused
from postcopy.monitor.argument_types import Arguments
from postcopy.parameter_rules import Kind, Rule
from postcopy.parameters import Capability, rules
from postcopy.sizes import MOST_DIGITS, OutOfRange, parse_size
from postcopy.status import Status

_INTEGER = re.compile(r"\s*(?P<sign>[-+]?)(?:(?P<hex>0[xX][0-9a-fA-F]+)|(?P<digits>[0-9]+))")
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


def parse_value(name: str, rule: Rule, text: str) -> object:
    """The value of parameter ``name`` that ``text`` means, not yet checked against its range.

    :raises Refused: in QEMU's words, which may be several lines.
    """
    if rule.mebibytes:
        try:
            return parse_size(text, default_unit="m")
        except ValueError:
            raise Refused(f"Invalid size {text}") from None
    match rule.kind:
        case Kind.SIZE:
            return _size(name, text)
        case Kind.UINT8 | Kind.UINT32:
            return _integer(name, text)
        case Kind.BOOLEAN:
            if text not in {"on", "off"}:
                raise Refused(f"Parameter '{name}' expects 'on' or 'off'")
            return text == "on"
        case Kind.STRINGS:
            return _strings(name, text)
    return text


def _strings(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise Refused(f"Parameter '{name}' expects words as for a shell: {error}") from None


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except OutOfRange:
        raise Refused(f"Value '{text}' is out of range for parameter '{name}'") from None
    except ValueError:
        expects = "expects a non-negative number below 2^64"
        raise Refused(f"Parameter '{name}' {expects}\n{_SIZE_HINT}") from None


def _integer(name: str, text: str) -> int:
    found = _INTEGER.fullmatch(text)
    value = 2**64
    if found and len(text) <= MOST_DIGITS:
        value = int(found["hex"], 16) if found["hex"] else int(found["digits"])
    if value >= 2**64 or found is None:
        raise Refused(f"Parameter '{name}' expects uint64")
    return -value if found["sign"] == "-" else value


# QMP's checks have other words for an unknown name than HMP.
def _known(names: Iterable[str], name: str) -> str:
    if name not in names:
        raise Refused(f"invalid parameter value: {name}")
    return name


def state(line: Arguments) -> Arguments:
    """The QMP arguments of ``migrate_continue``."""
    return {"state": _known([each.value for each in Status], line["state"])}


def capability(line: Arguments) -> Arguments:
    """The QMP arguments of ``migrate_set_capability``."""
    return {"capabilities": [{**line, "capability": _known([*Capability], line["capability"])}]}


def parameter(line: Arguments) -> Arguments:
    """The QMP arguments of ``migrate_set_parameter``."""
    name = _known(rules(), line["parameter"])
    return {name: parse_value(name, rules()[name], line["value"])}
