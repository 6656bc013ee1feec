"""Between a guest's process and its engine: messages and descriptors over one Unix socket.

``rpc`` is the way messages go, ``protocol`` what both sides must agree on; ``guest`` runs in the guest's
process, ``engine`` in the engine's.
"""
