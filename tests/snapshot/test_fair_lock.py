"""A lock in turns."""

import threading

from postcopy.snapshot.bitmap import FairLock


def test_who_waits_comes_before_who_comes_again():
    turns, order = FairLock(), []
    waiting = threading.Event()

    def wait():
        waiting.set()
        with turns:
            order.append("who waited")

    with turns:
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert waiting.wait(10)
        # It is about to wait, or waits: from then on the other lock is taken.
        while turns._next.acquire(blocking=False):
            turns._next.release()
    with turns:
        order.append("who came again")
    thread.join(10)
    assert order == ["who waited", "who came again"]


def test_one_at_a_time():
    turns = FairLock()
    inside = []

    def work():
        for _ in range(200):
            with turns:
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
