"""The way to the peer: bytes in, bytes out; knows no records.

``address`` reads QEMU's URIs, ``connect`` and ``listen`` turn one into a :class:`Channel`, and
``rate_limit`` paces what is sent.
"""
