"""Background snapshots: images of guests that go on running."""
