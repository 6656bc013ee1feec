"""Where the pages of a block come from: what is asked of a few pages agrees with what is asked of all."""

from types import SimpleNamespace

import pytest

from postcopy.snapshot.image import open_image
from postcopy.snapshot.origin import Origin
from snapshot.images import PAGE, memory, write_image

FORMS = ("mapped-ram", "stream")


@pytest.mark.parametrize("per_page", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_pages_with_data_are_told_one_by_one_in_windows_and_all_at_once(tmp_path, form, per_page):
    blocks = memory()
    path = write_image(tmp_path / "image", form, blocks)
    with open_image(path) as image:
        block = SimpleNamespace(name="ram", target_pages_per_page=per_page)
        origin, whole = Origin(image, block), Origin(image, block).data.tolist()
        expected = blocks["ram"].any(axis=1).reshape(-1, per_page).any(axis=1)
        assert whole == expected.tolist()
        assert [origin.has(page) for page in range(len(whole))] == whole
        for first, end in ((0, len(whole)), (3, 11), (8, 9), (7, 7)):
            assert origin.has_data(first, end).tolist() == whole[first:end]
        assert PAGE * per_page * len(whole) == blocks["ram"].nbytes
