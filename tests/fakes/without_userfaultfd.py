"""Runs a command in a process in which no userfaultfd can be had, however it is asked for.

``python without_userfaultfd.py COMMAND...``: a seccomp filter refuses the system call, and the request
that the device ``/dev/userfaultfd`` takes; whatever the command starts inherits it.
"""

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
NUMBER, SECOND_ARGUMENT = 0, 16 + 8  # where they are in struct seccomp_data
IOCTL, USERFAULTFD, USERFAULTFD_IOC_NEW = 16, 323, 0xAA00

FILTER = (
    (LOAD_WORD, 0, 0, NUMBER),
    (JUMP_EQUAL, 4, 0, USERFAULTFD),
    (JUMP_EQUAL, 0, 2, IOCTL),
    (LOAD_WORD, 0, 0, SECOND_ARGUMENT),
    (JUMP_EQUAL, 1, 0, USERFAULTFD_IOC_NEW),
    (RETURN, 0, 0, ALLOW),
    (RETURN, 0, 0, REFUSE),
)


def forbid() -> None:
    """Install the filter in this process, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = b"".join(struct.pack("<HBBI", *step) for step in FILTER)
    steps = ctypes.create_string_buffer(code)
    program = struct.pack("<H6xQ", len(FILTER), ctypes.addressof(steps))
    pointer = ctypes.create_string_buffer(program)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(pointer)),
    ):
        if libc.prctl(*(ctypes.c_ulong(value) for value in (*arguments, 0, 0))):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])
