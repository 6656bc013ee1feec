"""What a QEMU sends into an image, changed on the way: there is a whole image, or none."""

import contextlib
import random

import pytest

from fakes.qemu_versions import ALL
from fakes.real_qemu import MICROVM, QemuProcess, bios
from fakes.receiving import Receiving, recorded, send
from interop.test_receive_qemu import multifd
from postcopy.errors import PostcopyError
from postcopy.image.manifest import Manifest
from postcopy.image.verify import find_damages

PAGE = 4096
MUTATIONS = 20
COMPRESSIONS = {"7.2": "zlib", "10.0": "none", "11.1": "zstd"}


@pytest.mark.qemu(*ALL)
def test_mutations_of_what_qemu_sends(tmp_path, qemu_version):
    """Whatever arrives in its place: a whole image, or none and an error that says what and where."""
    compression = COMPRESSIONS[qemu_version]
    chance = random.Random(compression)
    loaded = bytes(PAGE) + chance.randbytes(40 * PAGE) + b"text" * 10 * PAGE
    (tmp_path / "loaded").write_bytes(loaded)
    line = ["-S", "-accel", "tcg", "-M", MICROVM, "-m", "2M", *bios(tmp_path / "qemu")]
    line += ["-device", f"loader,file={tmp_path / 'loaded'},addr=0x10000,force-raw=on"]
    with QemuProcess(tmp_path / "qemu", line) as qemu:
        how = multifd(2, compression)
        qemu.capabilities(*how.capabilities)
        qemu("migrate-set-parameters", **how.parameters)
        streams = recorded(qemu, tmp_path)
    assert len(streams) == 3
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(MUTATIONS):
        image = folder / f"{number}"
        with Receiving(f"unix:{tmp_path / 'm'}", image) as receiving:
            send(mutated(streams, chance) if number else streams, receiving.uri)
            with contextlib.suppress(*[PostcopyError] if number else []):  # unchanged, it arrives
                receiving.result()
        if image.exists():
            assert list(find_damages(image, Manifest.load(image))) == []
    assert not [each for each in folder.iterdir() if each.name.endswith(".partial")]


def mutated(streams: list[bytes], chance: random.Random) -> list[bytes]:
    """With a few bytes changed, left out or put in, mostly where a packet or an element begins."""
    changed = [bytearray(each) for each in streams]
    for _ in range(chance.randint(1, 3)):
        stream = chance.choice(changed)
        at = chance.randrange(min(len(stream), 1500) if chance.random() < 0.7 else len(stream))
        match chance.randrange(4):
            case 0:
                stream[at] = chance.randrange(256)
            case 1:
                stream[at] ^= 1 << chance.randrange(8)
            case 2:
                del stream[at : at + chance.randint(1, 9)]
            case _:
                stream[at:at] = chance.randbytes(chance.randint(1, 9))
    return [bytes(each) for each in changed]
