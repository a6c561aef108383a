"""A disk on which nothing large can be written any more."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

# What this stand-in has the system say, where a disk says "No space left on device".
FULL = os.strerror(errno.EFBIG)


@contextlib.contextmanager
def full_disk(free: int = 4096) -> Iterator[None]:
    """No file of this process grows beyond `free` bytes: libraries in C and Rust meet it too."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
