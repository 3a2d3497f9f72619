"""Memory in pages of 2 MiB, for what a step reads from end to end: weights and the KV cache.

With pages of 4 KiB the processor looks up an address every 64 cache lines, and its prefetchers stop
there: decode attention, which reads pieces of 8 KiB, takes a fifth longer.
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

_PAGE = 2 << 20


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
