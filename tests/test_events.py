"""The event bus: order, subscribers that fail, wall clock times."""

import threading

from postcopy.events import Event, EventBus


def test_all_subscribers_see_the_same_order():
    bus, one, two = EventBus(), [], []
    bus.subscribe(one.append)
    bus.subscribe(two.append)
    threads = [
        threading.Thread(
            target=lambda: [bus.emit("MIGRATION_PASS", {"pass": i}) for i in range(50)]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(one) == 200
    assert one == two


def test_unsubscribed_means_silence_and_a_failure_stays_alone(caplog):
    bus, heard = EventBus(), []
    bus.subscribe(lambda _: 1 / 0)
    unsubscribe = bus.subscribe(heard.append)
    bus.emit("STOP")
    unsubscribe()
    unsubscribe()
    bus.emit("RESUME")
    assert [event.name for event in heard] == ["STOP"]
    assert "a subscriber failed on event STOP" in caplog.text


def test_as_qmp_sends_it():
    event = Event("MIGRATION", {"status": "active"}, 5, 6)
    time = {"seconds": 5, "microseconds": 6}
    assert event.to_qmp() == {
        "timestamp": time, "event": "MIGRATION", "data": {"status": "active"},
    }  # fmt: skip
    assert "data" not in Event.now("STOP").to_qmp()
