"""Runs a command in a process in which no userfaultfd can be had, however it is asked for.

``python without_userfaultfd.py COMMAND...``: a seccomp filter refuses the system call, and the request
that the device ``/dev/userfaultfd`` takes; whatever the command starts inherits it.  With ``--user-mode``
before the command it refuses what a user without privileges is refused: the system call goes for
faults of user code.
"""

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_EQUAL, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
NUMBER, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 16, 16 + 8  # where they are in struct seccomp_data
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

UFFD_USER_MODE_ONLY = 1
USER_MODE_FILTER = (
    (LOAD_WORD, 0, 0, NUMBER),
    (JUMP_EQUAL, 0, 2, USERFAULTFD),
    (LOAD_WORD, 0, 0, FIRST_ARGUMENT),
    (JUMP_IF_SET, 3, 4, UFFD_USER_MODE_ONLY),
    *FILTER[2:],
)


def forbid(steps_of_filter: tuple[tuple[int, int, int, int], ...]) -> None:
    """Install a filter in this process, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = b"".join(struct.pack("<HBBI", *step) for step in steps_of_filter)
    steps = ctypes.create_string_buffer(code)
    program = struct.pack("<H6xQ", len(steps_of_filter), ctypes.addressof(steps))
    pointer = ctypes.create_string_buffer(program)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(pointer)),
    ):
        if libc.prctl(*(ctypes.c_ulong(value) for value in (*arguments, 0, 0))):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    command = sys.argv[1:]
    if command[0] == "--user-mode":
        forbid(USER_MODE_FILTER)
        del command[0]
    else:
        forbid(FILTER)
    os.execvp(command[0], command)
