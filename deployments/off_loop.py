"""Work on texts, in threads: the event loop must go on streaming meanwhile.

What is called here lets go of the GIL (tokenizing), is Python that the interpreter interrupts
(templates), or is one call whose length the limits on a body bound (JSON).
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Characters, or bytes: so many take some 20 ms to tokenize.
_SHORT = 64 * 1024
_LONG_TEXTS = ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 2) // 2)), "long-texts")


async def off_loop(size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `call` returns or raises. Short texts do not queue behind long ones.

    Args:
        size: of the text that the work is on, in characters or bytes.
    """
    threads = _LONG_TEXTS if size > _SHORT else None  # None: the event loop's own
    work = partial(copy_context().run, call, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(threads, work)
