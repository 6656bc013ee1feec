"""Changes of bytes, lines and JSON, as a hostile writer or a broken disk would make them."""

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

PLAIN_BYTES = 32  # a place amid as many equal bytes is contents of a page, which cannot lie
LONGEST_COPY_BYTES = 200
BOUNDARIES = (
    0, 1, 2, -1, -2, 127, 128, 255, 256, 4095, 4096, 4097, 0x7FFF, 0x8000, 0xFFFF, 1 << 20, 1 << 28,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096,
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, 1, -1, 0.5, 1e308, 1 << 31, 1 << 63, -(1 << 63), 1 << 64, 10**30, "", "x", "\0",
    "\ud800", "../../x", "9" * 5000, "x" * 5000, [], [[]], {}, {"name": 1}, float("inf"), float("nan"),
)  # fmt: skip


def mutated(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Change one of ``seeds`` at one to four places; bytes of the others are put into it."""
    raw = bytearray(chance.choice(seeds))
    places = _places(bytes(raw))
    for _ in range(chance.choice((1, 1, 1, 2, 2, 4))):
        if not raw:
            break
        at = chance.choice(places) if chance.random() < 0.9 else chance.randrange(len(raw))
        _change(raw, min(at, len(raw) - 1), seeds, chance)
    return bytes(raw)


def _change(raw: bytearray, at: int, seeds: Sequence[bytes], chance: random.Random) -> None:
    match chance.randrange(10):
        case 0 | 1:
            raw[at] ^= 1 << chance.randrange(8)
        case 2:
            new = chance.randbytes(chance.randrange(1, 9))
            raw[at : at + len(new)] = new
        case 3 | 4:
            _set_number(raw, at, chance)
        case 5:
            del raw[at : at + chance.choice((1, 2, 4, 8, chance.randrange(1, 100)))]
        case 6:
            end = at + chance.randrange(1, LONGEST_COPY_BYTES)
            raw[end:end] = raw[at:end]  # a record twice
        case 7 | 8:
            other = chance.choice(seeds)
            start = chance.choice(_places(other)) if other else 0
            piece = other[start : start + chance.randrange(1, LONGEST_COPY_BYTES)]
            raw[at : at + len(piece) * chance.randrange(2)] = piece
        case _:
            if chance.random() < 0.5:
                del raw[at:]
            else:
                raw += chance.randbytes(chance.randrange(1, 40))


def _set_number(raw: bytearray, at: int, chance: random.Random) -> None:
    """Set what may be a length to a number at which programs go wrong."""
    size = chance.choice((1, 2, 4, 8))
    order = chance.choice(("big", "big", "little"))
    number = chance.choice(BOUNDARIES)
    if chance.random() < 0.3:
        number = int.from_bytes(raw[at : at + size], order) + chance.choice((-1, 1, 4096, -4096))
    raw[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, order)


_KNOWN: dict[bytes, Sequence[int]] = {}


def _places(raw: bytes) -> Sequence[int]:
    """Where a change matters: all but the inner bytes of pages that are one byte over and over."""
    if raw not in _KNOWN:
        found = np.flatnonzero(np.diff(np.frombuffer(raw, np.uint8)))
        wide = (found[:, None] + np.arange(-PLAIN_BYTES, PLAIN_BYTES)).ravel()
        _KNOWN[raw] = np.unique(wide.clip(0, len(raw) - 1)).tolist() or [0]
    return _KNOWN[raw]


def mutated_json(seeds: Sequence[Any], chance: random.Random) -> Any:
    """Change one of ``seeds``, which JSON can carry, at one to three places."""
    value = json.loads(json.dumps(chance.choice(seeds)))
    for _ in range(chance.choice((1, 1, 2, 3))):
        if not (nodes := list(_nodes(value))):
            break
        parent, key = chance.choice(nodes)
        match chance.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent[key], int) and not isinstance(parent[key], bool):
                parent[key] += chance.choice((-1, 1, 4096, chance.choice(BOUNDARIES)))
            case 2:
                other, name = chance.choice(nodes)
                if name in other if isinstance(other, dict) else name < len(other):
                    parent[key] = json.loads(json.dumps(other[name]))
            case 3 if isinstance(parent, list):
                parent.append(json.loads(json.dumps(parent[key])))
            case 4 if isinstance(parent[key], str):
                parent[key] = _other_text(parent[key], chance)
            case _:
                parent[key] = json.loads(json.dumps(chance.choice(ODD_VALUES)))
    return value


def _nodes(value: Any) -> Any:
    """Parent and key of each value inside."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from _nodes(value[key])


def _other_text(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice(("", "A", "=", "\0", "\u20ac", "AAAA")) + text[at + 1 :]
