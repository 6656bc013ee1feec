"""Between a guest's process and its engine: messages and descriptors over one Unix socket.

``rpc`` is the way messages go, ``guest_service`` and ``guest_proxy`` the two ends of "what an engine
asks of a guest", ``engine_process`` starts engines, and ``control`` is what a monitor drives.
"""
