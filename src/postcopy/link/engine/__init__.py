"""The side of the link that runs in an engine's process: ``guest_proxy`` is the guest as it sees it."""
