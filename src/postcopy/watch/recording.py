"""A recorded run: a file of JSON lines, a header and then one sample a line.

The format has a version, and ``docs/watch.md`` describes it.  A file is hostile: each line has a bound and
is checked; what is wrong is refused by name and offset.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from postcopy.errors import ImageError, Refused
from postcopy.watch.sample import Sample

FORMAT: Final = "postcopy-watch"
VERSION: Final = 1
_MOST_LINE_BYTES: Final = 1 << 20
_MOST_SAMPLES: Final = 1_000_000
_MOST_TEXT: Final = 300
_MOST_BRACKETS: Final = 500


@dataclass(frozen=True, slots=True)
class Header:
    """What was recorded.

    :ivar source, destination: QMP addresses; None: that side was not watched.
    :ivar began: ISO 8601, with the offset from UTC.
    """

    source: str | None
    destination: str | None
    began: str

    def to_json(self) -> dict[str, Any]:
        """The first line of a file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "destination": self.destination,
            "began": self.began,
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Make it of a first line.

        :raises ValueError: it is another file, or of a later version.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError("it is no recorded run: the first line has no format 'postcopy-watch'")
        if value.get("version") != VERSION:
            raise ValueError(
                f"it is of version {str(value.get('version'))[:20]} of the format, and this program "
                f"reads version {VERSION}"
            )
        texts = [value.get("source"), value.get("destination"), value.get("began")]
        for name, text in zip(("source", "destination", "began"), texts, strict=True):
            if text is None and name != "began":
                continue
            if not isinstance(text, str) or len(text) > _MOST_TEXT or not text.isprintable():
                raise ValueError(f"'{name}' of the header is not what it must be")
        return cls(texts[0], texts[1], str(texts[2]))


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole file.

    :ivar cut_at: the offset of a last line that is not whole, as a recorder that was killed leaves it.
    """

    header: Header
    samples: list[Sample] = field(default_factory=list)
    cut_at: int | None = None


class Recorder:
    """Writes a file, line by line, so that what has been seen is there whatever happens.

    :raises Refused: it cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        try:
            self._file = path.open("wb", buffering=0)
            self._write(header.to_json())
        except OSError as error:
            raise Refused(
                f"--record {path}: {error.strerror}; give a file that can be written"
            ) from error

    def add(self, sample: Sample) -> None:
        """Write one.

        :raises Refused: the disk is full, or the like; what was written before stays.
        """
        try:
            self._write(sample.to_json())
        except OSError as error:
            raise Refused(f"the record ends: {error.strerror}") from error

    def _write(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close it."""
        self._file.close()


def read(path: str | os.PathLike[str]) -> Recording:
    """Read a recorded run.

    :raises ImageError: it cannot be read, or is damaged: the text says what, and at which byte.
    """
    try:
        with Path(path).open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror}") from error


def _read(path: str | os.PathLike[str], file: BinaryIO) -> Recording:
    header: Header | None = None
    samples: list[Sample] = []
    for offset, line in _lines(path, file):
        if not line.endswith(b"\n"):
            if header is None:
                raise ImageError(path, "it ends within its first line", offset)
            return Recording(header, samples, offset)
        try:
            value = _parsed(line)
            if header is None:
                header = Header.from_json(value)
                continue
            sample = Sample.from_json(value)
            _check_order(samples, sample)
        except ValueError as error:
            raise ImageError(path, _why(error), offset) from error
        samples.append(sample)
    if header is None:
        raise ImageError(path, "the file is empty", 0)
    return Recording(header, samples)


def _parsed(line: bytes) -> Any:
    """The value of a line; one of ours nests three deep.

    :raises ValueError: it is no JSON, or nests so deeply that to parse it would end in the interpreter.
    """
    if line.count(b"[") + line.count(b"{") > _MOST_BRACKETS:
        raise ValueError(f"a line has more than {_MOST_BRACKETS} brackets")
    return json.loads(line)


def _check_order(samples: list[Sample], sample: Sample) -> None:
    if samples and sample.t_ms < samples[-1].t_ms:
        raise ValueError("'t_ms' of a sample is before that of the one before it")
    if len(samples) >= _MOST_SAMPLES:
        raise ValueError(f"there are more than {_MOST_SAMPLES} samples")


def _lines(path: str | os.PathLike[str], file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while line := file.readline(_MOST_LINE_BYTES):
        if len(line) == _MOST_LINE_BYTES and not line.endswith(b"\n"):
            raise ImageError(path, f"a line is longer than {_MOST_LINE_BYTES} bytes", offset)
        yield offset, line
        offset += len(line)


def _why(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "a line is no JSON"
    return str(error)
