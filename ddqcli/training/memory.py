"""Memory of a training process on a CPU: pages that a step frees serve the next one."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_TRIM_ABOVE = 2**31 - 1  # free bytes; the process returns what is more; mallopt takes an int
_LARGEST = 2**25  # bytes of a block, above which it is returned anyway; glibc allows no more


def keep_freed_memory() -> None:
    """Keep freed memory in the process. Does nothing without glibc.

    Otherwise each large activation or gradient gets fresh pages, whose first use costs as much as
    two passes over it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # TypeError on Windows
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _TRIM_ABOVE)
