"""What becomes of memory that nobody needs: kept for the next who asks, or given back.

The system clears each page of memory at its first touch, which can take longer than to compute what
is written there. The C library hands large blocks back as soon as they are freed, and asks for the
next ones anew.

A weight on a mapped file costs memory from the first look at it on. Given back, it costs none, and
is read again when it is next looked at: from the system's cache, where there is room for that.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
from torch import Tensor

# Of each page, /proc/self/pagemap has a number with these bits (Linux, admin-guide/mm/pagemap).
PRESENT, SWAPPED, OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def release(weight: Tensor) -> None:
    """Give back what a weight takes in memory, if it lies on a mapped file, as the file has it.
    Else, and on systems that cannot tell, nothing happens."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-weight.data_ptr() // page) * page
    stop = (weight.data_ptr() + weight.nbytes) // page * page
    if start < stop and is_the_files_own(start, stop):
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def is_the_files_own(start: int, stop: int) -> bool:
    """Whether the memory between two addresses, multiples of the page's size, is a file's and no
    page of it was written to: such a page is in no file, and given back it would be lost."""
    size = np.dtype(np.uint64).itemsize
    try:
        with open("/proc/self/pagemap", "rb") as file:  # noqa: PTH123 (not a path of anyone's)
            file.seek(start // mmap.PAGESIZE * size)
            pages = np.frombuffer(file.read((stop - start) // mmap.PAGESIZE * size), np.uint64)
    except OSError:
        return False
    in_memory = pages[pages & PRESENT != 0]
    return bool(len(in_memory) and (in_memory & OF_A_FILE).all() and not (pages & SWAPPED).any())


def keep_freed() -> None:
    """Have the C library keep what is freed, in this process from now on, until `trim`. Elsewhere
    than on Linux with glibc nothing happens."""
    if libc := linux_libc("mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)  # no block is a mapping of its own, however large
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def trim() -> None:
    """Give the system what was freed. The C library of most Linux systems keeps it for whoever asks
    next, gigabytes of it if they were many pieces of some megabytes, as weights are."""
    if libc := linux_libc("malloc_trim"):
        libc.malloc_trim(0)


def linux_libc(name: str) -> ctypes.CDLL | None:
    """The C library, if the system is Linux and it has this function."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, name) else None
