"""What may be under way, requests, and the order of the push."""

import threading

from postcopy.source.counters import Counters, Rate, StageTimes, describe
from postcopy.source.flow_control import FlightWindow
from postcopy.source.user_requests import UserRequests
from postcopy.status import Status
from postcopy.stream.pings import FIRST_WINDOW_PING, WINDOW_PINGS


def test_waits_when_more_than_the_window_is_out():
    window = FlightWindow(100)
    first = window.sent(100)
    assert window.is_open
    window.sent(1)
    assert not window.is_open
    window.pong(first)
    assert window.is_open
    window.wait()  # returns at once


def test_a_wait_ends_with_the_pong():
    window = FlightWindow(10)
    ping = window.sent(50)
    waiter = threading.Thread(target=window.wait)
    waiter.start()
    assert waiter.is_alive()
    window.pong(ping)
    waiter.join(10)
    assert not waiter.is_alive()


def test_one_pong_answers_for_all_before_it():
    window = FlightWindow(50)
    pings = [window.sent(50) for _ in range(4)]
    assert pings[0] == FIRST_WINDOW_PING
    window.pong(pings[1])
    assert not window.is_open
    window.pong(pings[2])
    assert window.is_open
    window.pong(pings[0])  # late, or a lie
    assert window.is_open
    window.sent(1)
    assert not window.is_open


def test_other_pongs_do_not_matter():
    window = FlightWindow(10)
    window.sent(50)
    for value in (1, 2, 3, 4, 5, FIRST_WINDOW_PING + 7):
        window.pong(value)
    assert not window.is_open
    window.close()
    window.wait()


def test_numbers_come_round_and_stay_apart_from_qemus():
    window = FlightWindow(0)
    pings = []
    for _ in range(WINDOW_PINGS + 3):
        pings.append(window.sent(1))
        assert not window.is_open
        window.pong(pings[-1])
        assert window.is_open
    assert pings[:3] == pings[WINDOW_PINGS:]
    assert len(set(pings)) == WINDOW_PINGS
    assert min(pings) >= FIRST_WINDOW_PING


def test_orders_wake_whoever_sleeps():
    requests = UserRequests()
    assert not requests.postcopy_wanted
    requests.postcopy()
    assert requests.interrupt.is_set()
    assert requests.postcopy_wanted
    waiter = threading.Thread(target=requests.wait_to_proceed)
    waiter.start()
    assert waiter.is_alive()  # postcopy alone does not let it go on
    requests.proceed()
    waiter.join(10)
    assert not waiter.is_alive()
    assert not requests.cancelled


def test_cancel_ends_the_wait_too():
    requests = UserRequests()
    requests.cancel()
    requests.wait_to_proceed()
    assert requests.cancelled


def test_the_rate_is_of_the_last_tenth_of_a_second():
    now = [0.0]
    rate = Rate(lambda: now[0])
    now[0] = 0.05
    rate.add(500)
    assert rate.bytes_per_second == 10_000
    now[0] = 0.2
    rate.add(1500)
    assert rate.bytes_per_second == 10_000
    now[0] = 0.4
    rate.add(100)
    assert rate.bytes_per_second == 500


def test_figures_as_qemu_wants_them():
    counters = Counters(total_bytes=1 << 20, normal_pages=3, zero_pages=5, syncs=2, requests=1)
    counters.precopy_bytes, counters.downtime_bytes, counters.postcopy_bytes = 10, 20, 30
    clock = StageTimes()
    clock.started, clock.set_up, clock.stopped, clock.handed_over = 1.0, 1.25, 3.0, 3.5
    clock.confirmed, clock.ended = 3.75, 4.0
    info = describe(counters, Rate(), clock, Status.COMPLETED, 0)
    assert info.ram.transferred == 60
    assert (info.ram.normal, info.ram.normal_bytes, info.ram.duplicate) == (3, 3 * 4096, 5)
    assert (info.total_time_ms, info.setup_time_ms, info.downtime_ms) == (3000, 250, 500)
    assert info.measured.guest_downtime_us == 750_000
    assert info.ram.mbps == 60 / 3 * 8 / 1e6
