"""Knows when a kernel is compiled: each costs a second or more, and should come at start-up."""

import inspect
import logging
import sys
from functools import wraps
from typing import Any

import triton

_logger = logging.getLogger(__name__)
_FLASH_ATTN_4 = "flash_attn.cute.cache_utils"


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
