"""Calls of the C++ kernels recorded once and replayed in one: the CUDA graphs of a CPU.

Between two kernels Python needs microseconds, and several times as many right after one that has
swept the processor's caches with weights. In a decode step, with its two hundred kernels, that is
up to a tenth of the time.
"""

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Arena:
    """Memory for the tensors of recordings, which stays where it is while they may be replayed.

    What no tensor of Python's uses any more is given out again, so that the layers of a model pass
    the same few buffers around, as they do without recording.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}  # by size

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        # In powers of two, or batches of every size would have buffers of their own.
        size = max(1 << (count * dtype.itemsize - 1).bit_length(), mmap.PAGESIZE)
        free = self._free.setdefault(size, [])
        buffer = free.pop() if free else mmap.mmap(-1, size, flags=_PRIVATE)
        view = memoryview(buffer)  # lives as long as tensors that share this memory
        weakref.finalize(view, free.append, buffer).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=count).view(shape)


class _Memory(threading.local):
    arena: Arena | None = None  # while this thread records


_memory = _Memory()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, and recorded: what the kernels write to."""
    if _memory.arena is None:
        return torch.empty(shape, dtype=dtype)
    return _memory.arena.empty(shape, dtype)


class CpuRecorder:
    """Records on the thread that calls it; see `kernels.ops.Recorder`.

    One recorder is for one model, whose steps differ in nothing but their sizes.
    """

    ahead = False  # recording costs no more than running

    def __init__(self, library: ctypes.CDLL) -> None:
        library.manta_stop_recording.restype = ctypes.c_void_p
        library.manta_replay.argtypes = library.manta_discard.argtypes = [ctypes.c_void_p]
        self._library = library
        self._arena = Arena()
        self._is_without_torch = False

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
        # Watching takes as long as the work; the same model needs it once.
        watch = nullcontext() if self._is_without_torch else _WorkOfTorch()
        _memory.arena = self._arena
        self._library.manta_start_recording()
        try:
            with watch as work_of_torch:
                result = run()
        finally:
            _memory.arena = None
            replay = _Replay(self._library, self._library.manta_stop_recording(), self._arena)
        if work_of_torch is not None and work_of_torch.seen:
            return result, None
        self._is_without_torch = True
        return result, replay


class _Replay:
    def __init__(self, library: ctypes.CDLL, recording: int, arena: Arena) -> None:
        self._run = library.manta_replay
        self._recording = recording
        self._arena = arena  # kept, for the recording writes to it
        weakref.finalize(self, library.manta_discard, recording)

    def __call__(self) -> None:
        self._run(self._recording)


class _WorkOfTorch(TorchDispatchMode):
    """Notices torch's own operators, but for those that only view a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, which takes seconds, to keep it from compiling this."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.seen |= not func.is_view
        return func(*args, **kwargs or {})
