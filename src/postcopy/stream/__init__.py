"""QEMU's migration stream, version 3: bytes from and to records; no socket, no kernel, no side."""
