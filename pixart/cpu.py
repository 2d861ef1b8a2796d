"""Memory between this process and the C library.

glibc gives large blocks back to the system as soon as they are freed, and the system hands each out again page by
page, zeroed: on a CPU that was 13 to 23 % of the VAE's time, and up to a fifth of the network's with its gradients.
"""

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Have this process keep for its next allocations what it frees, from now on. → whether it will: Linux with glibc.

    The peak stays what it was, but the process does not shrink below it until `give_memory_back`. `scripts/` all ask
    for this; a program that imports pixart may, before its work.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


def give_memory_back() -> None:
    """Return all that is freed to the system, where this process keeps it."""
    gc.collect()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
