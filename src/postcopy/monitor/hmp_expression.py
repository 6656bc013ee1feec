"""Numbers in HMP: expressions such as ``(0xffff0+8)*2``, modulo 2**64.

``+ -`` bind least, then ``& | ^``, then ``* / %``, as in QEMU's monitor.
"""

import operator
import re
from collections.abc import Callable

from postcopy.errors import Refused
from postcopy.sizes import MOST_DIGITS

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*")
_MAX_NESTING = 100

_Operators = dict[str, Callable[[int, int], int]]
_LEVELS: tuple[_Operators, ...] = (
    {"+": operator.add, "-": operator.sub},
    {"&": operator.and_, "|": operator.or_, "^": operator.xor},
    {"*": operator.mul, "/": operator.floordiv, "%": operator.mod},
)


class Expression:
    """Evaluates the expression at the beginning of ``text``; :attr:`rest` is what follows it."""

    def __init__(self, text: str) -> None:
        self.rest = text.lstrip()
        self._nesting = 0
        self.value = self._level(0)

    def _skip(self, length: int) -> None:
        self.rest = self.rest[length:].lstrip()

    def _level(self, level: int) -> int:
        if level == len(_LEVELS):
            return self._unary()
        left = self._level(level + 1)
        while self.rest[:1] in _LEVELS[level] and self.rest:
            symbol = self.rest[0]
            self._skip(1)
            right = self._level(level + 1)
            if symbol in "/%" and right == 0:
                raise Refused("division by zero")
            left = _LEVELS[level][symbol](left, right) % 2**64
        return left

    def _unary(self) -> int:
        match self.rest[:1]:
            case "":
                raise Refused("unexpected end of expression")
            case "+" | "-" | "~" | "(" as symbol:
                return self._nested(symbol)
            case "'":
                return self._character()
            case "$":
                raise Refused("unknown register")
        number = _NUMBER.match(self.rest)
        if number is None:
            raise Refused(f"invalid char '{self.rest[0]}' in expression")
        digits = number.group()
        if len(digits) > MOST_DIGITS:
            raise Refused("number too large")
        octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
        value = int(digits, 8) if octal else int(digits, 0)
        if value >= 2**64:
            raise Refused("number too large")
        self._skip(number.end())
        return value

    def _nested(self, symbol: str) -> int:
        self._nesting += 1
        if self._nesting > _MAX_NESTING:
            raise Refused("expression is nested too deeply")
        self._skip(1)
        if symbol == "(":
            value = self._level(0)
            if not self.rest.startswith(")"):
                raise Refused("')' expected")
            self._skip(1)
        else:
            value = self._unary()
            value = {"+": value, "-": -value, "~": ~value}[symbol] % 2**64
        self._nesting -= 1
        return value

    def _character(self) -> int:
        if len(self.rest) < 3 or self.rest[2] != "'":
            raise Refused("character constant expected")
        value = ord(self.rest[1])
        self._skip(3)
        return value
