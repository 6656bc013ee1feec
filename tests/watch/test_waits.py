"""What vCPUs wait for: of our destination, of a QEMU, and of an engine that came after a dead one."""

from postcopy.watch.waits import Waited, total


def ours(**causes):
    causes = {name: list(each) for name, each in causes.items()}
    waited = [sum(each) for each in zip(*causes.values(), strict=True)]
    return {"x-postcopy": {"blocktime-us": waited, "blocktime-causes-us": causes}}


def test_what_our_destination_says_is_told_as_it_is():
    waits = Waited()
    assert waits.take({"status": "active"}) == {}
    assert waits.take(ours(page=(10, 0))) == {"page": (10, 0)}
    assert waits.take(ours(page=(10, 5), paused=(700, 0))) == {"page": (10, 5), "paused": (700, 0)}


def test_a_successor_begins_at_zero_and_nothing_is_lost():
    waits = Waited()
    waits.take(ours(page=(10, 5)))
    assert waits.take(ours(engine=(300, 0))) == {"page": (10, 5), "engine": (300, 0)}
    assert waits.take(ours(engine=(300, 0), page=(1, 1))) == {"engine": (300, 0), "page": (11, 6)}
    found = waits.take(ours(engine=(0, 9)))
    assert found == {"engine": (300, 9), "page": (11, 6)}
    assert total(found) == (311, 15)
    assert waits.take({"status": "postcopy-active"}) == found


def test_a_qemu_tells_no_cause():
    waits = Waited()
    assert waits.take({"status": "active"}) == {}
    assert waits.take({"postcopy-vcpu-blocktime": [7, 0]}) == {"page": (7000, 0)}
