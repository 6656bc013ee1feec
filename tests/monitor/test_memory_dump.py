"""The layout of ``xp`` against what a real QEMU 10.0.2 printed for the same bytes.

Addresses are as QEMU 11.1 prints them.  Octal numbers are not: it puts blanks after their first 0.
"""

import pytest

from postcopy.monitor.memory_dump import dump

START = 0xFFFF0
MEMORY = bytes.fromhex("ea5be000f030362f32332f393900fc00") + bytes(64)


def read(address, length):
    return MEMORY[address - START :][:length]


@pytest.mark.parametrize(
    ("count", "form", "size_bytes", "first_line", "lines"),
    [
        (40, "x", 1, "0xea 0x5b 0xe0 0x00 0xf0 0x30 0x36 0x2f", 5),
        (3, "x", 8, "0x2f3630f000e05bea 0x00fc0039392f3332", 2),
        (5, "x", 2, "0x5bea 0x00e0 0x30f0 0x2f36 0x3332", 1),
        (9, "u", 4, "  14703594  792080624  959394610   16515129", 3),
        (3, "d", 8, " 3401960375889976298    70931939903615794", 2),
        (5, "d", 1, "234  91 224   0 240", 1),
        (5, "d", 2, "23530   224 12528 12086 13106", 1),
        (5, "o", 1, "0352 0133 0340   0 0360", 1),
        (5, "o", 2, "055752   0340 030360 027466 031462", 1),
        (3, "o", 8, "0274661417000070055752   03740003447113631462", 2),
        (20, "c", 1, r"'\xea' '[' '\xe0' '\x00' '\xf0' '0' '6' '/'", 3),
        (5, "c", 4, r"'\xea' '[' '\xe0' '\x00' '\xf0' '0' '6' '/' '2' '3' '/' '9' '9'"
         r" '\x00' '\xfc' '\x00'", 2),
    ],
)  # fmt: skip
def test_layouts(count, form, size_bytes, first_line, lines):
    printed = list(dump(read, START, count, form, size_bytes))
    assert printed[0] == f"{START:08x}: {first_line}"
    assert len(printed) == lines


def test_characters_with_a_name_of_their_own():
    assert list(dump(lambda _a, _n: b"'\\\n\r", 0, 4, "c", 1)) == [r"00000000: '\'' '\\' '\n' '\r'"]
