"""Launches of kernels: the first compiles, which takes a second or more; others should cost little.

`kernel[grid](…)` looks at its arguments, and then spends most of its time on what cannot have
changed since such arguments were there last. Here that is done once; after that the kernel that was
found goes straight to its launcher.
"""

import inspect
import logging
import sys
from functools import wraps
from typing import Any

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_logger = logging.getLogger(__name__)
_FLASH_ATTN_4 = "flash_attn.cute.cache_utils"
# What is used here of Triton is its own affair: this is what it is like in 3.6 to 3.9.
_IS_KNOWN = triton.__version__.split(".")[:2] in (["3", minor] for minor in "6789")
_compiled: dict[tuple[object, ...], Any] = {}


def cdiv(number: int, divisor: int) -> int:
    """Rounded up. (Triton's own works in kernels too, and takes 20 times as long.)"""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least that is not less."""
    return 1 << (number - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, but for the hooks of Triton's profiler."""
    if not _IS_KNOWN or type(kernel) is not JITFunction:  # the interpreter's, on a CPU
        kernel[grid](*args, **options)
        return
    device = driver.active.get_current_device()
    bind = kernel.device_caches[device][-1]
    # What a kernel is compiled for: types, and whether numbers and addresses are multiples of 16.
    bound, compiled_for, others = bind(*args, **options)
    key = (kernel.fn, device, *compiled_for, *others.items())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **options)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    handle, metadata = compiled.function, compiled.packed_metadata
    compiled.run(x, y, z, stream, handle, metadata, None, None, None, *bound.values())


class CompileWatch:
    """Counts the kernels that Triton and flash-attn 4 compile (or load from disk) in this process.

    `late` are the names of those that came after `start_serving`; each is also logged.
    """

    def __init__(self) -> None:
        self.num_compiled = 0
        self.late: list[str] = []
        self._serving = False
        triton.knobs.runtime.jit_post_compile_hook = self._count_triton
        if _FLASH_ATTN_4 in sys.modules:
            self._watch_flash_attn(sys.modules[_FLASH_ATTN_4].JITCache)

    def start_serving(self) -> None:
        """Warm-up is over."""
        self._serving = True

    def _count_triton(self, *, fn: Any, repr: str, **_: Any) -> None:
        self._count(fn.name, repr)

    def _watch_flash_attn(self, cache: Any) -> None:
        """It has no hook, but keeps every kernel in such a cache, by what it was compiled for."""
        keep = inspect.unwrap(cache.__setitem__)  # of an earlier watch

        @wraps(keep)
        def count_and_keep(own: Any, key: Any, kernel: Any) -> None:
            self._count("flash-attn 4", repr(key))
            keep(own, key, kernel)

        cache.__setitem__ = count_and_keep

    def _count(self, name: str, compiled_for: str) -> None:
        self.num_compiled += 1
        if self._serving:
            self.late.append(name)
            _logger.warning("compiled %s while requests were waiting: %s", name, compiled_for)
