"""Settings of the whole process that long runs on a CPU want."""

from __future__ import annotations

import ctypes
import sys

import torch

# mallopt's numbers in glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def prepare_process(threads: int | None = None) -> None:
    """Sets the number of threads, and keeps freed memory instead of giving it back to the system.

    By default glibc returns every large tensor to the system when it is freed and faults its pages in again for the
    next one, which costs more than the arithmetic of elementwise steps. The process stays at its peak size instead.

    Args:
        threads: for torch's operations; None leaves them as they are.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):  # another C library: it has its own habits
            return
        if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
            mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions take
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 1 << 28)
