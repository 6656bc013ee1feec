"""A batch takes a moment, on whatever way it goes."""

from postcopy.source.flow_control import LEAST_BYTES, MOMENT_S, BatchSize

MOST = 16 << 20


class Way:
    """Takes so many bytes a second."""

    def __init__(self, **bounds):
        self.now_s = 0.0
        self.size = BatchSize(MOST, lambda: self.now_s, **bounds)

    def send(self, n_bytes, per_second):
        self.size.begin()
        self.now_s += n_bytes / per_second
        self.size.end(n_bytes)
        return self.size.bytes


def test_it_grows_on_a_fast_way_to_no_more_than_the_most():
    way = Way()
    assert way.size.bytes == LEAST_BYTES
    sizes = [way.send(way.size.bytes + 26, 16e9) for _ in range(6)]
    assert sizes == [LEAST_BYTES << n for n in (1, 2, 3, 4, 4, 4)]


def test_it_shrinks_at_once_on_a_slow_one():
    way = Way()
    for _ in range(4):
        way.send(way.size.bytes, 16e9)
    assert way.send(MOST, 400e6) == int(400e6 * MOMENT_S)
    assert way.send(way.size.bytes, 1e6) == LEAST_BYTES
    assert way.send(way.size.bytes, 1e6) == LEAST_BYTES


def test_few_pages_that_go_quickly_say_nothing():
    way = Way()
    for _ in range(4):
        assert way.send(4096, 16e9) == LEAST_BYTES


def test_it_stays_where_a_batch_takes_a_moment():
    way = Way()
    rate = LEAST_BYTES / MOMENT_S / 0.9
    assert [way.send(way.size.bytes, rate) for _ in range(3)] == [LEAST_BYTES] * 3


def test_what_a_moment_is_and_how_little_is_enough_may_differ():
    way = Way(least_bytes=4096, moment_s=0.1)
    assert way.send(4096, 100e3) == 8192
    assert way.send(8192, 41e3) == 4100
    assert way.send(4100, 1e3) == 4096


def test_what_passes_in_between_does_not_count():
    way = Way()
    way.now_s = 100.0
    assert way.send(LEAST_BYTES, 16e9) == 2 * LEAST_BYTES


def test_what_passes_in_the_middle_does_not_count_if_nothing_was_sent():
    way = Way()
    way.size.begin()
    way.now_s += 50.0
    way.size.waited(50.0)
    way.now_s += 1e-4
    way.size.end(LEAST_BYTES)
    assert way.size.bytes == 2 * LEAST_BYTES


def test_it_grows_again_from_a_size_that_is_no_number_of_whole_pages():
    way = Way()
    way.send(LEAST_BYTES, 16e9)
    assert way.send(2 * LEAST_BYTES, 1.3e8) == 1_300_000
    grown = way.send(1_300_000 // 4096 * 4104, 16e9)
    assert grown == 2_600_000


def test_a_small_part_of_a_batch_does_not_let_it_grow():
    way = Way()
    assert way.send(LEAST_BYTES // 2 - 1, 16e9) == LEAST_BYTES
    assert way.send(LEAST_BYTES // 2, LEAST_BYTES / MOMENT_S) == LEAST_BYTES
