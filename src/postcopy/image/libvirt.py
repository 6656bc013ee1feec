"""The files of ``virsh save`` and ``managedsave``: a header and a domain's XML in front of QEMU's stream.

Source: libvirt's ``src/qemu/qemu_saveimage.h``.  All numbers are in the byte order of the host that wrote
them, which the version tells::

      0  16  magic: LibvirtQemudSave; LibvirtQemudPart until the file is whole
     16   4  version: 2; 3 where the stream is mapped-ram (format 6)
     20   4  bytes of what follows the header: XML and cookie, each ended by a zero byte, and room to edit
     24   4  whether the domain was running
     28   4  format of the stream: raw 0, gzip 1, bzip2 2, xz 3, lzop 4, zstd 5, sparse 6
     32   4  offset of the cookie behind the header; 0: none
     36  56  unused
"""

import contextlib
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any, Final

from postcopy.errors import ImageError, Refused
from postcopy.image.file import ImageFile

MAGIC: Final = b"LibvirtQemudSave"
PARTIAL_MAGIC: Final = b"LibvirtQemudPart"
LARGEST_XML_BYTES: Final = 16 << 20

_NUMBERS: Final = 5
_HEADER_BYTES: Final = 92
_VERSIONS: Final = frozenset({1, 2, 3})
_FORMATS: Final = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
_AS_IT_IS: Final = frozenset({"raw", "sparse"})
_PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class LibvirtHeader:
    """What libvirt has put in front of the stream.

    :ivar stream_offset: where the stream begins, in bytes.
    :ivar stream_format: such as ``raw`` or ``gzip``.
    :ivar xml: the domain.
    :ivar cookie: further XML of libvirt; ``None`` if there is none.
    """

    version: int
    stream_offset: int
    stream_format: str
    was_running: bool
    xml: str
    cookie: str | None

    @property
    def packed(self) -> bool:
        """Whether the stream has to be unpacked before it can be read."""
        return self.stream_format not in _AS_IT_IS

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)


def read_libvirt_header(file: ImageFile) -> LibvirtHeader | None:
    """Read the header, if the file has one.

    :raises ImageError: the header makes no sense; the error has the offset.
    """
    raw = file.read(0, _HEADER_BYTES).tobytes()
    magic = raw[: len(MAGIC)]
    if magic == PARTIAL_MAGIC:
        raise ImageError(file.path, "libvirt did not finish this file; save the domain again", 0)
    if magic != MAGIC:
        return None
    if len(raw) < _HEADER_BYTES:
        raise ImageError(file.path, "the file is cut off in libvirt's header", len(raw))
    version, data_bytes, running, kind, cookie_at = _numbers(file, raw)
    if kind >= len(_FORMATS):
        raise ImageError(
            file.path, f"libvirt's format {kind}; 0 to {len(_FORMATS) - 1} are known", 28
        )
    if data_bytes > LARGEST_XML_BYTES:
        most = f"at most {LARGEST_XML_BYTES} are taken"
        raise ImageError(file.path, f"libvirt's XML of {data_bytes} bytes; {most}", 20)
    if cookie_at >= max(data_bytes, 1):
        raise ImageError(file.path, f"libvirt's cookie at {cookie_at} of {data_bytes} bytes", 32)
    data = file.read(_HEADER_BYTES, data_bytes).tobytes()
    if len(data) < data_bytes:
        raise ImageError(file.path, "the file is cut off in libvirt's XML", file.size_bytes)
    return LibvirtHeader(
        version,
        _HEADER_BYTES + data_bytes,
        _FORMATS[kind],
        bool(running),
        _text(file, data, 0),
        _text(file, data, cookie_at) if cookie_at else None,
    )


def _numbers(file: ImageFile, raw: bytes) -> tuple[int, ...]:
    for order in "<>":
        numbers = struct.unpack_from(f"{order}{_NUMBERS}I", raw, len(MAGIC))
        if numbers[0] in _VERSIONS:
            return numbers
    raise ImageError(file.path, "libvirt's header is of no known version", len(MAGIC))


def _text(file: ImageFile, data: bytes, start: int) -> str:
    end = data.find(b"\0", start)
    try:
        return data[start : len(data) if end < 0 else end].decode()
    except UnicodeDecodeError as error:
        at = _HEADER_BYTES + start + error.start
        raise ImageError(file.path, "libvirt's XML is not UTF-8", at) from error


def unpack(file: ImageFile, header: LibvirtHeader, into: IO[bytes]) -> None:
    """Unpack the stream of a compressed file.

    :param into: grows as the stream does; it needs about the size of the guest's memory.
    :raises ImageError: it cannot be unpacked.
    :raises Refused: the program for it is missing.
    :raises OSError: the disk is full, or broken.
    """
    with file.path.open("rb") as packed:
        packed.seek(header.stream_offset)
        try:
            with _reader(header.stream_format, packed) as stream:
                while piece := stream.read(_PIECE_BYTES):
                    into.write(piece)
        except OSError as error:
            if error.errno is not None:
                raise
            raise _not_unpacked(file, header, error) from error  # of gzip or bz2: of the bytes
        except _unpack_errors() as error:
            raise _not_unpacked(file, header, error) from error
    into.flush()


def _not_unpacked(file: ImageFile, header: LibvirtHeader, error: Exception) -> ImageError:
    why = f"its stream cannot be unpacked by {header.stream_format}: {error}"
    return ImageError(file.path, why, header.stream_offset)


def _unpack_errors() -> tuple[type[Exception], ...]:
    import lzma
    import zlib

    import zstandard

    return (EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


@contextlib.contextmanager
def _reader(kind: str, packed: IO[bytes]) -> Iterator[IO[bytes]]:
    import bz2
    import gzip
    import lzma

    import zstandard

    match kind:
        case "gzip":
            yield gzip.GzipFile(fileobj=packed, mode="rb")  # type: ignore[misc]  # an IO, typed apart
        case "bzip2":
            yield bz2.BZ2File(packed)
        case "xz":
            with lzma.LZMAFile(packed) as stream:
                yield stream
        case "zstd":
            decompressor = zstandard.ZstdDecompressor()
            yield decompressor.stream_reader(packed, read_across_frames=True)
        case _:
            with _lzop(packed) as stream:
                yield stream


@contextlib.contextmanager
def _lzop(packed: IO[bytes]) -> Iterator[IO[bytes]]:
    """Run lzop(1), for which there is no library."""
    program = shutil.which("lzop")
    if program is None:
        raise Refused("the stream is packed by lzop, which is not installed; install lzop")
    command = [program, "-dc"]
    with subprocess.Popen(command, stdin=packed, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ValueError(f"lzop ended with {process.returncode}")
