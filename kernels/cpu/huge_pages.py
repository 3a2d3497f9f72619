"""Memory in pages of 2 MiB, for what a step reads from end to end: weights and the KV cache.

With pages of 4 KiB the processor looks up an address every 64 cache lines, and its prefetchers stop
there: decode attention, which reads pieces of 8 KiB, takes a fifth longer.
"""

import contextlib
import ctypes
import math
import mmap
import os
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

_PAGE = 2 << 20
# Of Linux. Collapsing gives shared memory large pages also where it gets none by itself.
_MADV_COLLAPSE, _MAP_FIXED, _MAP_POPULATE = 25, 0x10, 0x8000


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, on huge pages from one page on, where the system has them."""
    size = math.prod(shape) * dtype.itemsize
    if size < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    # Fresh from the system, for memory that has been used keeps the pages it has. What is mapped
    # only to begin and end at whole pages is never touched.
    mapped = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps it mapped
    start = -data.data_ptr() % _PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE, start, size // _PAGE * _PAGE)
    return data[start : start + size].view(dtype).view(shape)


def shared(file: int, size: int, writable: bool) -> Tensor:
    """The first `size` bytes of an open file in shared memory, on huge pages where it has them.

    Raises OSError. Whoever writes what is not writable dies of it.
    """
    system, flags = _system(), mmap.MAP_SHARED | _MAP_FIXED
    # Only what begins at a whole page can have large ones: take more room than is needed.
    room = system.mmap(None, size + _PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    _check(room)
    start = room + -room % _PAGE
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    flags |= 0 if writable else _MAP_POPULATE
    try:
        _check(system.mmap(start, size, access, flags, file, 0))
    except OSError:
        system.munmap(room, size + _PAGE)
        raise
    memory = (ctypes.c_char * size).from_address(start)
    weakref.finalize(memory, system.munmap, room, size + _PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def collapse(filled: Tensor) -> None:
    """Bring shared memory that has been filled onto huge pages, if the system can."""
    size = filled.nbytes // _PAGE * _PAGE
    _system().madvise(filled.data_ptr(), size, _MADV_COLLAPSE)


@cache
def _system() -> Any:
    system = ctypes.CDLL(None, use_errno=True)
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    system.mmap.restype = ctypes.c_size_t
    system.mmap.argtypes = [pointer, ctypes.c_size_t, integer, integer, integer, ctypes.c_long]
    system.munmap.argtypes = [pointer, ctypes.c_size_t]
    system.madvise.argtypes = [pointer, ctypes.c_size_t, integer]
    return system


def _check(address: int) -> None:
    if address == ctypes.c_size_t(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
