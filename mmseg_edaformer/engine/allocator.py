"""Memory of a process that computes on the CPU."""
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next allocation.

    glibc gives large blocks back to the system when they are freed, so that the output of every
    layer is mapped, zeroed and faulted in anew, page by page; tools/benchmark.py shows what that
    costs. Process-wide and of no effect elsewhere than on Linux with glibc. The process then stays
    as large as its largest moment, up to 2 GiB above what it uses.
    """
    if not sys.platform.startswith('linux'):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
