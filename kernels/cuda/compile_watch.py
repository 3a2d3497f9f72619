"""Knows when Triton compiles a kernel: each costs about a second, and should come at start-up."""

import logging
from typing import Any

import triton

_logger = logging.getLogger(__name__)


class CompileWatch:
    """Counts the kernels that Triton compiles (or loads from its cache) in this process.

    `late` are the names of those that came after `start_serving`; each is also logged.
    """

    def __init__(self) -> None:
        self.num_compiled = 0
        self.late: list[str] = []
        self._serving = False
        triton.knobs.runtime.jit_post_compile_hook = self._count

    def start_serving(self) -> None:
        """Warm-up is over."""
        self._serving = True

    def _count(self, *, fn: Any, repr: str, **_: Any) -> None:
        self.num_compiled += 1
        if self._serving:
            self.late.append(fn.name)
            _logger.warning("Triton compiled %s while requests were waiting: %s", fn.name, repr)
