"""What an image says apart from its pages, and that another format says the same."""

import numpy as np
import pytest

from image.images import RAM_ID, early_section, memory, stream_bytes, write_image
from postcopy.channel.whole_file import WholeFile
from postcopy.errors import ImageError
from postcopy.image.convert import write_mapped, write_stream
from postcopy.image.formats import open_image
from postcopy.stream.commands import encode_command
from postcopy.stream.file_records import Configuration
from postcopy.stream.records import OpenReturnPath, Ping, PostcopyAdvise, PostcopyListen

PAGE = 4096
HUGE = 2 << 20
WRITERS = {"stream": write_stream, "mapped-ram": write_mapped}


@pytest.fixture(params=["stream", "mapped-ram"])
def path(request, tmp_path):
    return write_image(tmp_path / "image", request.param, memory())


def convert(source, to, form):
    with open_image(source) as image, WholeFile(to) as file:
        WRITERS[form](image, file)
        file.publish()
    return to


def test_what_a_stream_of_the_guest_begins_and_ends_with(path):
    raw = path.read_bytes()
    with open_image(path) as image:
        assert image.configuration == Configuration("microvm")
        assert image.ram_section_id == RAM_ID
        assert [each.section_id for each in image.sections] == [RAM_ID + 1, RAM_ID + 2]
        assert raw.count(image.device_bytes()) == 1
        assert [block.page_size_bytes for block in image.blocks] == [PAGE, PAGE]


@pytest.mark.parametrize("form", WRITERS)
def test_another_format_says_the_same(tmp_path, path, form):
    converted = convert(path, tmp_path / "converted", form)
    with open_image(path) as image, open_image(converted) as other:
        assert other.format == form
        assert other.configuration == image.configuration
        assert (other.sections, other.ram_section_id) == (image.sections, RAM_ID)
        assert (other.blocks, other.description) == (image.blocks, image.description)
        for block in image.blocks:
            rows = image.read(block.name, 0, block.pages)
            np.testing.assert_array_equal(other.read(block.name, 0, block.pages), rows)
            np.testing.assert_array_equal(other.has_data(block.name), rows.any(axis=1))


@pytest.mark.parametrize("form", WRITERS)
def test_sections_in_front_of_the_memory_stay_there(tmp_path, form):
    (tmp_path / "image").write_bytes(stream_bytes(memory(), begin=early_section()))
    with open_image(convert(tmp_path / "image", tmp_path / "converted", form)) as image:
        assert (image.early_sections, len(image.sections)) == (1, 3)
        assert early_section() not in image.device_bytes()


class TestPostcopyAllowed:
    """A source that may go over to postcopy says so in front of the memory, and its page sizes with it."""

    def stream(self, tmp_path, *commands, **options):
        begin = b"".join(map(encode_command, commands))
        (tmp_path / "image").write_bytes(stream_bytes(memory(512, 4), begin=begin, **options))
        return open_image(tmp_path / "image")

    def test_a_stream_of_precopy_is_read(self, tmp_path):
        commands = OpenReturnPath(), Ping(1), PostcopyAdvise(PAGE, PAGE)
        with self.stream(tmp_path, *commands) as image:
            np.testing.assert_array_equal(image.read("ram", 0, 512), memory(512, 4)["ram"])

    def test_blocks_of_huge_pages_say_so(self, tmp_path):
        advise = PostcopyAdvise(HUGE | PAGE, PAGE)
        with self.stream(tmp_path, advise, page_sizes={"ram": HUGE}) as image:
            sizes = {block.name: block.page_size_bytes for block in image.blocks}
            assert sizes == {"ram": HUGE, "rom": PAGE}
            np.testing.assert_array_equal(image.read("ram", 0, 512), memory(512, 4)["ram"])

    def test_dirty_bitmaps_alone_have_no_page_sizes(self, tmp_path):
        self.stream(tmp_path, PostcopyAdvise()).close()

    @pytest.mark.parametrize(
        ("command", "why"),
        [
            (PostcopyAdvise(PAGE, 8192), "pages of 8192 bytes"),
            (PostcopyAdvise(PAGE | 512, PAGE), "page sizes 0x1200"),
            (PostcopyListen(), "PostcopyListen: a migration with postcopy is no image"),
        ],
    )
    def test_what_is_no_image_is_refused(self, tmp_path, command, why):
        with pytest.raises(ImageError, match=rf"{why}.*\(at byte 0x"):
            self.stream(tmp_path, command)
