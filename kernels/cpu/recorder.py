"""Calls of kernels recorded once and replayed: the CUDA graphs of a CPU.

Between two kernels Python needs microseconds, and several times as many right after one that has
swept the processor's caches with weights. In a decode step, with its two hundred kernels, that is
up to a tenth of the time, and a quarter where modules of transformers call them. C++ kernels are
replayed without Python; torch's operators, where a model has some, one by one on the same tensors.
"""

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Arena:
    """Memory for the tensors of recordings, which stays where it is while they may be replayed.

    What no tensor of Python's uses any more is given out again, so that the layers of a model pass
    the same few buffers around, as they do without recording.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}  # by size
        self._buffers: dict[int, mmap.mmap] = {}  # by address

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        # In powers of two, or batches of every size would have buffers of their own.
        size = max(1 << (count * dtype.itemsize - 1).bit_length(), mmap.PAGESIZE)
        free = self._free.setdefault(size, [])
        buffer = free.pop() if free else mmap.mmap(-1, size, flags=_PRIVATE)
        view = memoryview(buffer)  # lives as long as tensors that share this memory
        weakref.finalize(view, free.append, buffer).atexit = False
        flat = torch.frombuffer(view, dtype=dtype, count=count)
        self._buffers[flat.data_ptr()] = buffer
        return flat.view(shape)

    def copy_of(self, x: Tensor) -> Tensor:
        """The same in this memory, laid out alike."""
        if x.numel() == 0:
            return x
        extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        return self.empty((extent,), x.dtype).as_strided(x.shape, x.stride()).copy_(x)

    def lend(self, x: Tensor) -> Tensor:
        """The same tensor, but for that its memory is given out again when others let go of it."""
        buffer = self._buffers.get(x.untyped_storage().data_ptr())
        if buffer is None:  # of somebody else
            return x
        everything = torch.frombuffer(buffer, dtype=x.dtype)
        return everything.as_strided(x.shape, x.stride(), x.storage_offset())


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
        library.manta_num_recorded.restype = ctypes.c_int64
        library.manta_stop_recording.restype = ctypes.c_void_p
        library.manta_replay.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        library.manta_discard.argtypes = [ctypes.c_void_p]
        self._library = library
        self._arena = Arena()
        self._is_without_torch = False

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
        library, work = self._library, _WorkOfTorch(self._library, self._arena)
        _memory.arena = self._arena
        library.manta_start_recording()
        try:
            # Watching takes as long as the work; a model that has none of torch needs it once.
            with nullcontext() if self._is_without_torch else work:
                result = run()
        finally:
            _memory.arena = None
            work.calls.append((library.manta_num_recorded(), None))
            recording = library.manta_stop_recording()
            replay = _Replay(library, recording, self._arena, work)
        self._is_without_torch = len(work.calls) == 1 and work.is_repeatable
        return result, replay if work.is_repeatable else None


# How many calls of C++ kernels come before it, and a call of torch's; None at the end.
_Call = tuple[int, Callable[[], Any] | None]


class _Replay:
    def __init__(
        self, library: ctypes.CDLL, recording: int, arena: Arena, work: "_WorkOfTorch"
    ) -> None:
        self._calls: list[Callable[[], Any]] = []
        self._held = arena, work.constants  # memory that the recording reads and writes
        done = 0
        for before, call in work.calls:
            if before > done:
                self._calls.append(partial(library.manta_replay, recording, done, before))
                done = before
            if call is not None:
                self._calls.append(call)
        weakref.finalize(self, library.manta_discard, recording)

    def __call__(self) -> None:
        for call in self._calls:
            call()


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_READS = (torch.ops.aten.resolve_neg.default,)  # by which `tolist` and `numpy` begin
_OF_RESULTS = ("dtype", "layout", "device", "pin_memory")  # arguments that a result given has
_Tag = torch.Tag
_UNREPEATABLE = {
    _Tag.data_dependent_output,
    _Tag.dynamic_output_shape,
    _Tag.nondeterministic_seeded,
}


class _WorkOfTorch(TorchDispatchMode):
    """Keeps calls of torch's own operators, with results in memory that stays.

    What only views a tensor in another way has done so for good.
    """

    def __init__(self, library: ctypes.CDLL, arena: Arena) -> None:
        super().__init__()
        self._library = library
        self._arena = arena
        self.calls: list[_Call] = []
        self.constants: dict[int, Tensor] = {}  # made of Python's numbers, by storage
        self.is_repeatable = True  # no value of a tensor has been looked at, no rank talked to

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, which takes seconds, to keep it from compiling this."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = _storages((args, kwargs)), _storages(result)
        if func in _READS or func.namespace != "aten":  # as of ranks that talk to each other
            self.is_repeatable = False
        elif func is torch.ops.aten.lift_fresh.default:
            self.constants[min(outputs)] = result
        elif func._schema.is_mutable:
            if _Tag.inplace_view not in func.tags:
                self._keep(func, args, kwargs, _is_repeatable(func, args, result))
        elif outputs.isdisjoint(inputs):
            if func.is_view:  # or a copy, where it had to be
                with self:
                    return func.decompose(*args, **kwargs)
            result = tree_map_only(Tensor, self._arena.copy_of, result)
            self._keep(*_into(func, args, kwargs, result), _is_repeatable(func, args, result))
        elif not outputs <= inputs:  # some of it views, some new
            self.is_repeatable = False
        return result

    def _keep(self, func: Any, args: Any, kwargs: Any, is_repeatable: bool) -> None:
        self.is_repeatable &= is_repeatable
        args, kwargs = tree_map_only(Tensor, self._arena.lend, (args, kwargs))
        self.calls.append((self._library.manta_num_recorded(), partial(func, *args, **kwargs)))


def _storages(tensors: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_leaves(tensors) if isinstance(x, Tensor)}


def _is_repeatable(func: Any, args: Any, result: Any) -> bool:
    if not all(isinstance(x, Tensor) for x in tree_leaves(result)):
        return False
    unrepeatable = _UNREPEATABLE.intersection(func.tags)
    if func is torch.ops.aten.index.Tensor:  # of dynamic shape where a mask selects
        unrepeatable = {i for i in args[1] if i is not None and not i.dtype.is_signed}
    return not unrepeatable


def _into(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[Any, Any, Any]:
    """What computes the same anew into `result`: a function and its arguments."""
    if func in _COPIES:
        return torch.ops.aten.copy_.default, (result, args[0]), {}
    if isinstance(result, Tensor) and (out := _out_variant(func)) is not None:
        return (
            out,
            args,
            {k: v for k, v in kwargs.items() if k not in _OF_RESULTS} | {"out": result},
        )

    def compute(result: Any, args: Any, kwargs: Any) -> None:
        for into, found in zip(
            tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True
        ):
            into.copy_(found)

    return compute, (result, args, kwargs), {}


@cache
def _out_variant(func: Any) -> Any:
    """The overload of an operator that writes to a tensor it is given, if there is one."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if a.name not in _OF_RESULTS]
    for name in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, name)
        arguments = [a for a in other._schema.arguments if a.name != "out"]
        if len(arguments) < len(other._schema.arguments) and wanted == [
            (a.name, str(a.type)) for a in arguments
        ]:
            return other
    return None
