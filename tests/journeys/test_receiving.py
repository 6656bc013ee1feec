"""A guest of ours that is migrated to an image instead of a machine."""

import numpy as np

from fakes.pair import idle
from fakes.receiving import Receiving
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest
from postcopy.image.verify import find_damages
from postcopy.status import Status


def test_the_source_gives_its_guest_up_when_the_image_is_there(journey, tmp_path):
    """It asks whether all has arrived before it sends the end, where a QEMU asks nothing."""
    source = journey(idle()).source
    image = tmp_path / "image"
    with Receiving(f"unix:{tmp_path / 'way'}", image) as receiving:
        source.control.migrate(receiving.uri)
        source.wait(Status.COMPLETED)
        receiving.result()
    assert list(find_damages(image, Manifest.load(image))) == []
    truth = source.ram()
    with open_image(image) as found:
        (block,) = found.blocks
        np.testing.assert_array_equal(found.read(block.name, 0, block.pages), truth)
        assert found.devices
    assert not source.machine.running
