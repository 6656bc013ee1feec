"""What the kernel's headers say: one module a header, declarations only.

Nothing here opens a descriptor, makes a call or raises: that is :mod:`postcopy.kernel`.  Every name
is the kernel's own.  ``tests/abi/test_headers.py`` compiles the real headers and compares; it finds
by these conventions what there is to compare, so a new module needs no new test:

``HEADER: str``
    what stands after ``#include``, such as ``"<linux/userfaultfd.h>"``.  Several headers: separate
    them by blanks.  A module without it (``ioctl``) is not compared.
:class:`ctypes.Structure`
    ``class uffdio_copy`` is compared with ``struct uffdio_copy``: its size, and the offset of each
    field, descending into nested structures and unions (``arg.pagefault.address``).  Fields and
    classes whose names begin with an underscore have no name in C and are not compared by name.
:class:`~postcopy.abi.ioctl.Ioctl`, :class:`~postcopy.abi.ioctl.PlainIoctl`
    its number, by its name.
``NAME: int``
    a module-level number in capitals is compared with the macro or enumerator of that name.
``C_NAMES: dict[type[enum.IntEnum | enum.IntFlag], str]``
    how the members of an enumeration are called in C: ``{Feature: "UFFD_FEATURE_{}"}``.  Any C
    expression will do.  Every enumeration of the module must be in it.
``NEWER: frozenset[str]``
    names (``uffdio_poison``, ``UFFDIO_POISON``, ``Feature.POISON``) that the oldest header we support
    (Linux 6.1) lacks.  Where they are in the header they are compared; where they are not, the
    test says so, and proves them against the running kernel.  Any other name must be found.
"""
