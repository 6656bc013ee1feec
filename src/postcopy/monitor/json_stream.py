"""JSON as QMP clients write it: a stream of values, with QEMU's extensions and complaints.

Strings may stand in single quotes.  After something that is no JSON at all the reader takes up
again at the next control character or bracket, so one bad request costs a client one answer.
"""

import enum
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_TOKENS_BYTES = 1 << 20
"""A message (or a single token) that is longer is refused before more is stored."""
MAX_NESTING = 200
"""QEMU allows 1024; the parser recurses, and no request is deeper than five."""


class JsonError(ValueError):
    """Not JSON; the text is QEMU's."""


class _Kind(enum.Enum):
    PUNCTUATION = enum.auto()
    STRING = enum.auto()
    NUMBER = enum.auto()
    KEYWORD = enum.auto()


@dataclass(frozen=True, slots=True)
class _Token:
    kind: _Kind
    text: str


_SPACE = re.compile(rb"[ \t\r\n]*")
# Possessive: a long string that has not ended yet must not be tried in every shorter form.
_IN_STRING = rb"(?:[^%s\\\x00-\x1f\xfe\xff]++|\\[\x20-\xfd])*+"
_DOUBLE, _SINGLE = _IN_STRING % b'"', _IN_STRING % b"'"
_WHOLE = (
    (_Kind.PUNCTUATION, re.compile(rb"[][{},:]")),
    (_Kind.STRING, re.compile(rb"\"%s\"|'%s'" % (_DOUBLE, _SINGLE))),
    # What follows tells whether a number or keyword is whole, so something must follow.
    (
        _Kind.NUMBER,
        re.compile(
            rb"-?(?:0(?![0-9])|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![0-9.eE]|\Z)"
        ),
    ),
    (_Kind.KEYWORD, re.compile(rb"[a-z]+(?![a-z]|\Z)")),
)
# What may still become a token; one more byte than this is what QEMU calls stray.
_BEGUN = re.compile(
    rb"\"%s\\?|'%s\\?|-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]*)?|-|[a-z]+|"
    % (_DOUBLE, _SINGLE)
)
_RECOVERED = re.compile(rb"[\x00-\x1f\xfe\xff\[\]{}:,]")


class JsonStream:
    """Turns bytes, cut anywhere, into values.  One thread uses it."""

    def __init__(self) -> None:
        self._rest = b""
        self._recovering = False
        self._tokens: list[_Token] = []
        self._tokens_bytes = 0
        self._depth = 0

    def feed(self, data: bytes) -> Iterator[Any]:
        """The values that ``data`` completes; a :class:`JsonError` stands where none could be."""
        self._rest += data
        while (item := self._next_token()) is not None:
            if isinstance(item, JsonError):
                self._forget()
                yield item
            elif (message := self._add(item)) is not None:
                yield message[0]
        if len(self._rest) > MAX_TOKENS_BYTES:
            self._rest = b""
            self._forget()
            yield JsonError("JSON token size limit exceeded")

    def _next_token(self) -> _Token | JsonError | None:
        if self._recovering:
            found = _RECOVERED.search(self._rest)
            if not found:
                self._rest = b""
                return None
            self._rest = self._rest[found.start() :]
            self._recovering = False
        space = _SPACE.match(self._rest)
        self._rest = self._rest[space.end() if space else 0 :]
        for kind, pattern in _WHOLE:
            if token := pattern.match(self._rest):
                self._rest = self._rest[token.end() :]
                return _Token(kind, token.group().decode(errors="surrogateescape"))
        return self._stray()

    def _stray(self) -> JsonError | None:
        begun = _BEGUN.match(self._rest)
        end = begun.end() if begun else 0
        if end >= len(self._rest):
            return None  # the rest of the token is still to come
        text, self._rest = self._rest[: end + 1], self._rest[end + 1 :]
        self._recovering = True
        return JsonError(f"JSON parse error, stray '{text.decode(errors='replace')}'")

    def _add(self, token: _Token) -> tuple[Any] | None:
        # A message in a 1-tuple once its brackets are balanced: null is a message too.
        self._tokens.append(token)
        self._tokens_bytes += len(token.text)
        if token.kind is _Kind.PUNCTUATION:
            self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token.text, 0)
        message: Any
        if self._depth > MAX_NESTING:
            message = JsonError("JSON nesting depth limit exceeded")
        elif self._tokens_bytes > MAX_TOKENS_BYTES:
            message = JsonError("JSON token size limit exceeded")
        elif self._depth > 0:
            return None
        else:
            message = self._parsed()
        self._forget()
        return (message,)

    def _parsed(self) -> Any:
        try:
            return _Parser(self._tokens).value()
        except JsonError as error:
            return error

    def _forget(self) -> None:
        self._tokens, self._tokens_bytes, self._depth = [], 0, 0


class _Parser:
    """Recursive descent over the tokens of one message."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = iter([*tokens, _Token(_Kind.PUNCTUATION, "")])

    def value(self) -> Any:
        return self._value(next(self._tokens))

    def _value(self, token: _Token) -> Any:
        match token.kind, token.text:
            case _Kind.PUNCTUATION, "{":
                return self._object()
            case _Kind.PUNCTUATION, "[":
                return self._array()
            case _Kind.STRING, text:
                return _string(text[1:-1])
            case _Kind.NUMBER, text:
                return _number(text)
            case _Kind.KEYWORD, text:
                return _keyword(text)
        raise JsonError("JSON parse error, expecting value")

    def _object(self) -> dict[str, Any]:
        members: dict[str, Any] = {}
        token = next(self._tokens)
        while token.text != "}" or members:
            key = self._value(token)
            if not isinstance(key, str):
                raise JsonError("JSON parse error, key is not a string in object")
            if next(self._tokens).text != ":":
                raise JsonError("JSON parse error, missing : in object pair")
            value = self.value()
            if key in members:
                raise JsonError("JSON parse error, duplicate key")
            members[key] = value
            if not self._another("}", "dict"):
                break
            token = next(self._tokens)
        return members

    def _array(self) -> list[Any]:
        items: list[Any] = []
        token = next(self._tokens)
        while token.text != "]" or items:
            items.append(self._value(token))
            if not self._another("]", "list"):
                break
            token = next(self._tokens)
        return items

    def _another(self, end: str, what: str) -> bool:
        token = next(self._tokens)
        if token.kind is _Kind.PUNCTUATION and token.text in {",", end}:
            return token.text == ","
        raise JsonError(f"JSON parse error, expected separator in {what}")


def _string(text: str) -> str:
    if any("\ud800" <= character < "\ue000" for character in text):  # bytes that are no UTF-8
        raise JsonError("JSON parse error, invalid UTF-8 sequence in string")
    return _ESCAPE.sub(_unescape, text)


def _number(text: str) -> int | float:
    try:
        number = int(text)
    except ValueError:  # a fraction, an exponent, or more digits than int() takes
        return _real(text)
    # QEMU knows 64 bits; a larger number is a float to it.
    return number if -(2**63) <= number < 2**64 else _real(text)


def _real(text: str) -> float:
    if math.isinf(number := float(text)):
        raise JsonError("JSON parse error, number out of range")
    return number


def _keyword(text: str) -> bool | None:
    try:
        return {"true": True, "false": False, "null": None}[text]
    except KeyError:
        raise JsonError(f"JSON parse error, invalid keyword '{text}'") from None


_SIMPLE_ESCAPES = {
    "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'",
}  # fmt: skip
_PAIR = r"u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})"
_ESCAPE = re.compile(rf"\\(?:{_PAIR}|u([0-9a-fA-F]{{4}})|(.))", re.DOTALL)


def _unescape(escape: re.Match[str]) -> str:
    high, low, single, simple = escape.groups()
    if simple is not None:
        if simple not in _SIMPLE_ESCAPES:
            raise JsonError("JSON parse error, invalid escape sequence in string")
        return _SIMPLE_ESCAPES[simple]
    if high is not None:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
    code = int(single, 16)
    if 0xD800 <= code < 0xE000 or code == 0 or code in {0xFFFE, 0xFFFF}:
        raise JsonError(f"JSON parse error, \\u{single} is not a valid Unicode character")
    return chr(code)
