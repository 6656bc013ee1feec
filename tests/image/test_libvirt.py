"""Files of ``virsh save``, made of a header of our own and a stream."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest
import zstandard

from fakes.commands import one_line, postcopy
from image.images import memory, stream_bytes, write_image, write_manifest
from postcopy.errors import ImageError
from postcopy.image.compare import compare
from postcopy.image.finalize import convert
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest
from postcopy.image.options import ImageOptions
from postcopy.image.records import read_records
from postcopy.image.verify import find_damages

XML = "<domain type='kvm'><name>guest</name></domain>"
COOKIE = "<qemusavecookie/>"
FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


def header(form="raw", *, order="<", version=2, room=200, magic=b"LibvirtQemudSave", **more):
    data = XML.encode() + b"\0"
    cookie_at = len(data)
    data = (data + COOKIE.encode() + b"\0").ljust(room, b"\0")
    numbers = {"version": version, "length": len(data), "running": 1}
    numbers |= {"format": FORMATS.index(form), "cookie": cookie_at} | more
    return struct.pack(f"{order}16s5I56x", magic, *numbers.values()) + data


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_raw_file(tmp_path, order):
    (tmp_path / "saved").write_bytes(header(order=order) + stream_bytes(memory()))
    with open_image(tmp_path / "saved") as image:
        assert image.format == "stream"
        assert (image.libvirt.xml, image.libvirt.cookie) == (XML, COOKIE)
        assert image.libvirt.was_running
        for name, rows in memory().items():
            np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)


def test_every_command_takes_it(tmp_path):
    saved = tmp_path / "saved"
    saved.write_bytes(header() + stream_bytes(memory()))
    shown = postcopy("inspect", str(saved))
    assert (shown.returncode, XML in shown.stdout) == (0, True)
    assert "format raw, the domain was running" in shown.stdout
    assert json.loads(postcopy("inspect", "--json", str(saved)).stdout)["libvirt"]["xml"] == XML
    lines = postcopy("inspect", "--json", "--records", str(saved)).stdout.splitlines()
    assert [json.loads(line)["offset"] for line in lines[:2]] == [0, len(header())]
    assert postcopy("extract", str(saved), "--ram", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_bytes() == memory()["ram"].tobytes()
    refused = postcopy(
        "extract", str(write_image(tmp_path / "a", "stream", memory())), "--ram", str(saved)
    )
    assert "is an image of a guest" in one_line(refused)


@pytest.mark.parametrize("form", [*PACKERS, "lzop"])
def test_a_compressed_file_is_converted_first(tmp_path, form):
    saved, new = tmp_path / "saved", tmp_path / "new"
    if form == "lzop":
        if shutil.which("lzop") is None:
            pytest.skip("needs lzop: run .ci/install-tools")
        done = subprocess.run(["lzop"], input=stream_bytes(memory()), stdout=-1, check=True)
        packed = done.stdout
    else:
        packed = PACKERS[form](stream_bytes(memory()))
    saved.write_bytes(header(form) + packed)
    with pytest.raises(ImageError, match=f"with {form}; type 'postcopy convert {saved} NEW'"):
        open_image(saved)
    convert(saved, new, ImageOptions())
    with open_image(new) as image:
        assert image.format == "mapped-ram"
        np.testing.assert_array_equal(image.read("ram", 0, 48), memory()["ram"])
    saved.write_bytes(header(form) + packed[: len(packed) // 2])
    with pytest.raises(ImageError, match=f"{saved}: "):
        convert(saved, tmp_path / "other", ImageOptions())
    assert list(tmp_path.glob("other*")) == []


def test_lzop_that_is_missing_is_named(tmp_path):
    saved = tmp_path / "saved"
    saved.write_bytes(header("lzop") + b"\x89LZO")
    outcome = postcopy("convert", str(saved), str(tmp_path / "new"), env=os.environ | {"PATH": "/"})
    assert outcome.returncode == 3
    assert "install lzop" in one_line(outcome)


@pytest.mark.parametrize(
    ("raw", "why", "at"),
    [
        (header(magic=b"LibvirtQemudPart"), "libvirt did not finish this file", 0),
        (header(version=9), "of no known version", 16),
        (header(length=1 << 31), "XML of 2147483648 bytes", 20),
        (header(format=7), "libvirt's format 7", 28),
        (header(cookie=4000), "cookie at 4000 of 200 bytes", 32),
        (header()[:60], "cut off in libvirt's header", 60),
        (header()[:150], "cut off in libvirt's XML", 150),
        (header().replace(b"domain", b"d\xff\xfexxx", 1), "XML is not UTF-8", 94),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(tmp_path, raw, why, at):
    (tmp_path / "saved").write_bytes(raw)
    with pytest.raises(ImageError, match=rf"{why}.*\(at byte {at:#x}\)"):
        open_image(tmp_path / "saved")


class TestConvert:
    @pytest.mark.parametrize("source", ["stream", "mapped-ram", "chunks"])
    @pytest.mark.parametrize("form", ["stream", "mapped-ram", "chunks"])
    def test_every_format_into_every_other(self, tmp_path, source, form):
        path = write_image(tmp_path / "a", "stream", memory())
        for number, each in enumerate((source, form)):
            options = ImageOptions("mapped-ram" if each == "chunks" else each, each == "chunks")
            made = convert(path, tmp_path / f"made-{number}", options)
            path = tmp_path / f"made-{number}"
            assert made.manifest.form == each
        with open_image(tmp_path / "a") as image, open_image(path) as other:
            assert (other.sections, other.configuration) == (image.sections, image.configuration)
            for name, rows in memory().items():
                np.testing.assert_array_equal(other.read(name, 0, len(rows)), rows)
            assert compare(image, other).equal
        assert list(find_damages(path, Manifest.load(path))) == []
        records = []
        read_records(path, records.append)
        assert [each.values["block"] for each in records if each.kind == "block"] == ["ram", "rom"]

    def test_the_command(self, tmp_path):
        path = write_image(tmp_path / "a", "stream", memory())
        made = tmp_path / "b"
        outcome = postcopy("convert", str(path), str(made), "--format", "chunks", "--json")
        assert json.loads(outcome.stdout)["format"] == "chunks"
        outcome = postcopy("convert", str(path), str(tmp_path / "c"), "--parent", str(made))
        assert outcome.returncode == 2

    def test_nothing_is_replaced_and_nothing_damaged_is_copied(self, tmp_path):
        path = write_image(tmp_path / "a", "stream", memory())
        assert postcopy("convert", str(path), str(path)).returncode == 3
        write_manifest(path)
        with path.open("r+b") as file:
            file.seek(-5, 2)
            file.write(b"x")
        outcome = postcopy("convert", str(path), str(tmp_path / "b"))
        assert (outcome.returncode, (tmp_path / "b").exists()) == (1, False)
