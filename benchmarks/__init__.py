"""Our engine and a real QEMU side by side, on the same guest, in the same run: ``make bench``."""
