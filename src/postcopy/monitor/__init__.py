"""The monitors: QMP with QEMU's schema for this subsystem, and HMP on top of it."""
