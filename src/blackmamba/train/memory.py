"""How the process gets memory from the operating system while it trains on a CPU."""

import ctypes
import os
import sys

import torch

from blackmamba.ops.native.pages import HUGE_PAGE, MADV_HUGEPAGE

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
_done = False


def keep_freed_memory(device: torch.device) -> None:
    """Let malloc keep what is freed, in large pages, for the rest of the process.

    A step makes and frees the same large tensors as the last one. By default glibc gives those
    back at once and asks for them anew, and the kernel clears every page each time: a quarter of
    a step's time on a CPU. Nothing happens for a GPU or with another C library.
    """
    global _done
    if _done or device.type != "cpu" or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:  # musl
        return
    mallopt(_M_MMAP_MAX, 0)  # no tensor gets a mapping of its own
    mallopt(_M_TRIM_THRESHOLD, -1)  # never shrink the heap
    mallopt(_M_TOP_PAD, 64 << 20)  # grow it in large pieces
    _want_huge_pages(libc)
    _done = True


def _want_huge_pages(libc: ctypes.CDLL) -> None:
    """Ask for huge pages where the heap will grow.

    Tensors whose rows are read side by side, as in the scan, lie in more pages than a processor
    keeps addresses of. The heap gets its addresses now, half as many as there is memory; memory
    itself it gets where it is written to.
    """
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    begin = libc.malloc(memory // 2)
    if begin is None:  # the system allows no more addresses than it has memory for
        return
    libc.free(begin)
    end = libc.sbrk(0)
    first = -(-begin // HUGE_PAGE) * HUGE_PAGE
    if begin < end and end - first > HUGE_PAGE:
        libc.madvise(first, end - first, MADV_HUGEPAGE)  # refused without harm
