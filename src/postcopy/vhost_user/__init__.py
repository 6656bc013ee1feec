"""vhost-user: a virtio device in a process of its own, through precopy, postcopy and the end of a peer.

To write a back end derive from :class:`Device` and call :func:`serve`; ``docs/vhost_user.md`` shows how.
"""

from postcopy.vhost_user.device import Device, Request
from postcopy.vhost_user.server import serve

__all__ = ["Device", "Request", "serve"]
