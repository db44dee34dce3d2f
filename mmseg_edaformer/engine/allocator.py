"""Memory of processes that compute on the CPU."""
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next allocation; needs Linux with glibc.

    Else the output of every layer is mapped, zeroed and faulted in again, page by page. The process
    then keeps its peak size, up to 2 GiB more than it uses.
    """
    if not sys.platform.startswith('linux'):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
