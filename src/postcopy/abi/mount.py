"""What ``<linux/mount.h>`` says about mounts that are made with descriptors alone.

Nothing here makes a call: that is :mod:`postcopy.kernel.huge_tmpfs`.
"""

HEADER = "<linux/mount.h>"

FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1

FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
