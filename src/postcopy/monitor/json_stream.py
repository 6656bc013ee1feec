"""JSON as QMP clients write it: a stream of values, with QEMU's extensions and complaints.

Strings may stand in single quotes.  A complaint comes as soon as its token has: ``LINE:COLUMN``, both
from 1 on and in bytes since the client connected, is where that token begins.  What is left of the
message, until its brackets are balanced, is passed over.  After something that is no JSON at all the
reader takes up again at the next bracket, comma, colon, or control character other than a tab.
"""

import enum
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_TOKENS_BYTES = 1 << 20
"""A message (or a single token) that is longer is refused before more is stored."""
MAX_NESTING = 200
"""QEMU allows 1024; no request is deeper than five."""


class JsonError(ValueError):
    """Not JSON; the text is QEMU's."""


class _Mistake(ValueError):
    """A token that does not belong there: the complaint without its place."""


class _Kind(enum.Enum):
    PUNCTUATION = enum.auto()
    STRING = enum.auto()
    NUMBER = enum.auto()
    KEYWORD = enum.auto()


@dataclass(frozen=True, slots=True)
class _Token:
    kind: _Kind
    text: str
    place: str


_SPACE = re.compile(rb"[ \t\r\n]*")
# Possessive: a long string that has not ended yet must not be tried in every shorter form.
_IN_STRING = rb"(?:[^%s\\\x00-\x1f\xfe\xff]++|\\[\x20-\xfd])*+"
_DOUBLE, _SINGLE = _IN_STRING % b'"', _IN_STRING % b"'"
_INTEGER = rb"-?(?:0|[1-9][0-9]*+)"
_WHOLE = (
    (_Kind.PUNCTUATION, re.compile(rb"[][{},:]")),
    (_Kind.STRING, re.compile(rb"\"%s\"|'%s'" % (_DOUBLE, _SINGLE))),
    # What follows tells whether a number or keyword is whole, so something must follow.
    (_Kind.NUMBER, re.compile(rb"%s(?![0-9.eE]|\Z)" % _INTEGER)),
    (_Kind.NUMBER, re.compile(rb"%s\.[0-9]++(?![eE]|\Z)" % _INTEGER)),
    (_Kind.NUMBER, re.compile(rb"%s(?:\.[0-9]++)?[eE][+-]?[0-9]++(?!\Z)" % _INTEGER)),
    (_Kind.KEYWORD, re.compile(rb"[a-z]++(?!\Z)")),
)
# What may still become a token; one more byte than this is what QEMU calls stray.
_BEGUN = re.compile(
    rb"\"%s\\?|'%s\\?|-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]*)?|-|[a-z]+|"
    % (_DOUBLE, _SINGLE)
)
_RECOVERED = re.compile(rb"[\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]")


class JsonStream:
    """Turns bytes, cut anywhere, into values.  One thread uses it."""

    def __init__(self) -> None:
        self._rest = b""
        self._recovering = False
        self._line, self._column = 1, 1
        self._looked_ahead = False
        self._message = _Message()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The values that ``data`` completes; a :class:`JsonError` stands where none could be."""
        self._rest += data
        while (item := self._next_token()) is not None:
            if isinstance(item, JsonError):
                if not self._message.refused:
                    yield item
                self._message = _Message()
                continue
            if (message := self._message.take(item)) is not None:
                yield message[0]
            if self._message.ended:
                self._message = _Message()
        if len(self._rest) > MAX_TOKENS_BYTES:
            self._cut(len(self._rest))
            self._message = _Message()
            yield JsonError("JSON token size limit exceeded")

    def _cut(self, n_bytes: int) -> bytes:
        cut, self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        self._line += cut.count(b"\n")
        self._column = n_bytes - cut.rfind(b"\n") if b"\n" in cut else self._column + n_bytes
        return cut

    def _next_token(self) -> _Token | JsonError | None:
        if self._recovering:
            found = _RECOVERED.search(self._rest)
            self._cut(found.start() if found else len(self._rest))
            if not found:
                return None
            self._recovering = False
            self._looked_ahead = True
        if (space := _SPACE.match(self._rest)) and space.end():
            self._cut(space.end())
            self._looked_ahead = False
        for kind, pattern in _WHOLE:
            if token := pattern.match(self._rest):
                place = self._place(ends_by_next=kind in {_Kind.NUMBER, _Kind.KEYWORD})
                text = self._cut(token.end()).decode(errors="surrogateescape")
                return _Token(kind, text, place)
        return self._stray()

    def _place(self, *, ends_by_next: bool) -> str:
        # QEMU counts a byte twice that has ended a number, a keyword or rubbish and begins a token.
        place = f"{self._line}:{self._column + self._looked_ahead}"
        self._looked_ahead = ends_by_next
        return place

    def _stray(self) -> JsonError | None:
        begun = _BEGUN.match(self._rest)
        end = begun.end() if begun else 0
        if end >= len(self._rest):
            return None  # the rest of the token is still to come
        place = self._place(ends_by_next=False)
        # QEMU's text ends at a NUL.
        text = _shown(self._cut(end + 1).partition(b"\0")[0].decode(errors="surrogateescape"))
        self._recovering = True
        return JsonError(f"{place}: JSON parse error, stray '{text}'")


class _Message:
    """What has come of one message, until its brackets are balanced.

    :ivar refused: it has had its complaint, and the rest of it is passed over.
    """

    def __init__(self) -> None:
        self.refused = False
        self._parser = _Parser()
        self._n_bytes = 0
        self._braces = self._brackets = 0  # how many are open

    @property
    def ended(self) -> bool:
        """Whether the next token begins another."""
        least, most = sorted((self._braces, self._brackets))
        return least < 0 or most == 0

    def take(self, token: _Token) -> tuple[Any] | None:
        """What ``token`` completes, in a 1-tuple (null is a message too), or a complaint about it."""
        self._n_bytes += len(token.text)
        self._braces += {"{": 1, "}": -1}.get(token.text, 0)
        self._brackets += {"[": 1, "]": -1}.get(token.text, 0)
        if self.refused:
            return None
        try:
            return self._checked(token)
        except JsonError as error:
            self.refused = True
            return (error,)

    def _checked(self, token: _Token) -> tuple[Any] | None:
        if self._braces + self._brackets > MAX_NESTING:
            raise JsonError("JSON nesting depth limit exceeded")
        if self._n_bytes > MAX_TOKENS_BYTES:
            raise JsonError("JSON token size limit exceeded")
        try:
            return self._parser.take(token)
        except _Mistake as mistake:
            raise JsonError(f"{token.place}: JSON parse error, {mistake}") from mistake


class _Parser:
    """Makes one message of its tokens, each as it comes."""

    def __init__(self) -> None:
        self._open: list[dict[str, Any] | list[Any]] = []
        self._keys: list[str] = []
        self._next: Callable[[_Token], tuple[Any] | None] = self._value

    def take(self, token: _Token) -> tuple[Any] | None:
        """Go on with ``token``: the message in a 1-tuple when that was its last.

        :raises _Mistake: it does not belong there.
        """
        return self._next(token)

    def _value(self, token: _Token) -> tuple[Any] | None:
        match token.text:
            case "{":
                self._open.append({})
                self._next = self._first_key
            case "[":
                self._open.append([])
                self._next = self._first_item
            case _:
                return self._done(_scalar(token))
        return None

    def _first_item(self, token: _Token) -> tuple[Any] | None:
        return self._done(self._open.pop()) if token.text == "]" else self._value(token)

    def _first_key(self, token: _Token) -> tuple[Any] | None:
        return self._done(self._open.pop()) if token.text == "}" else self._key(token)

    def _key(self, token: _Token) -> tuple[Any] | None:
        if token.kind is not _Kind.STRING:
            raise _Mistake("expecting key")
        self._keys.append(_string(token.text))
        self._next = self._colon
        return None

    def _colon(self, token: _Token) -> None:
        if token.text != ":":
            raise _Mistake("expecting ':'")
        self._next = self._value

    def _separator(self, token: _Token) -> tuple[Any] | None:
        in_list = isinstance(self._open[-1], list)
        end = "]" if in_list else "}"
        if token.text == end:
            return self._done(self._open.pop())
        if token.text != ",":
            raise _Mistake(f"expected ',' or '{end}'")
        self._next = self._value if in_list else self._key
        return None

    def _done(self, value: Any) -> tuple[Any] | None:
        if not self._open:
            return (value,)
        self._next = self._separator
        around = self._open[-1]
        if isinstance(around, list):
            around.append(value)
        elif (key := self._keys.pop()) in around:
            raise _Mistake("duplicate key")
        else:
            around[key] = value
        return None


def _scalar(token: _Token) -> Any:
    match token.kind:
        case _Kind.STRING:
            return _string(token.text)
        case _Kind.NUMBER:
            return _number(token.text)
        case _Kind.KEYWORD:
            return _keyword(token.text)
    raise _Mistake("expecting value")


def _number(text: str) -> int | float:
    try:
        number = int(text)
    except ValueError:  # a fraction, an exponent, or more digits than int() takes
        return _real(text)
    # QEMU knows 64 bits; a larger number is a float to it.
    return number if -(2**63) <= number < 2**64 else _real(text)


def _real(text: str) -> float:
    if math.isinf(number := float(text)):
        raise _Mistake("number out of range")
    return number


def _keyword(text: str) -> bool | None:
    try:
        return {"true": True, "false": False, "null": None}[text]
    except KeyError:
        raise _Mistake(f"invalid keyword '{text}'") from None


_SIMPLE_ESCAPES = {
    "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'",
}  # fmt: skip
_PAIR = r"u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})"
_NO_CHARACTERS = "\ufdd0-\ufdef" + "".join(
    chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)
)
# Bytes that are no UTF-8 have become surrogates.  As in QEMU, C0 80 is a NUL.
_NO_TEXT = re.compile(f"\udcc0\udc80|[\ud800-\udfff{_NO_CHARACTERS}]")
_ODD = re.compile(rf"\\(?:{_PAIR}|u([0-9a-fA-F]{{4}})|(.))|{_NO_TEXT.pattern}", re.DOTALL)
_NUL = "\udcc0\udc80"


def _string(quoted: str) -> str:
    return _ODD.sub(lambda odd: _plain(odd, quoted), quoted[1:-1])


def _plain(odd: re.Match[str], quoted: str) -> str:
    high, low, single, simple = odd.groups()
    if high is not None:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
    if simple in _SIMPLE_ESCAPES:
        return _SIMPLE_ESCAPES[simple]
    if single is not None and not _NO_TEXT.match(character := chr(int(single, 16))):
        return character
    if single is not None or simple == "u":
        escape = _shown(quoted[odd.start() + 1 :][:6])
        raise _Mistake(f"{escape} is not a valid Unicode character")
    if simple is not None:
        raise _Mistake("invalid escape sequence in string")
    if odd.group() == _NUL:
        return "\0"
    raise _Mistake("invalid UTF-8 sequence in string")


def _shown(text: str) -> str:
    return _NO_TEXT.sub(lambda odd: "\0" if odd.group() == _NUL else "\ufffd", text)
