"""A loaded model in a file in shared memory: the next process that wants the same maps it.

The file holds the tensors as they have been packed for this device, and behind them the rest of the
model, pickled. Locks of the system say who is at it, so whoever dies leaves nothing behind: a file
that is filled is locked for others, and one that is used is locked in common.
"""

import fcntl
import io
import logging
import os
import pickle
import struct
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from kernels.cpu import huge_pages

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
# The path of the file that all of this node share, by the name of what is to be in it; or None.
WeightFiles = Callable[[str], str | None]

# At the end of a file that is complete: where the pickle begins, and how long it is.
_END = struct.Struct("<QQ8s")
_MAGIC = b"mantaweg"
_LARGE, _LINE = 2 << 20, 64  # alignments, of large tensors and others
_WAIT_S = 0.05


class SharedFile(Generic[Model]):
    """
    Args:
        known: what models refer to that every process has of its own, by names.
    """

    def __init__(self, path: str, known: Mapping[str, Any], device: torch.device) -> None:
        self._known = dict(known)
        self._device = device
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def model(self, load: Callable[[], Model]) -> Model:
        """The model that is in the file, or that `load` returns, which then is in it.

        Who comes while another fills the file waits for it.
        """
        fcntl.flock(self._file, fcntl.LOCK_SH)
        while (end := self._end()) is None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another is as far as this; that has given up the lock
                time.sleep(_WAIT_S)
                fcntl.flock(self._file, fcntl.LOCK_SH)
                continue
            if self._end() is None:
                loaded = load()
                try:
                    self._fill(loaded)
                except (
                    OSError,
                    ValueError,
                    TypeError,
                    AttributeError,
                    pickle.PickleError,
                ) as error:
                    logger.warning("The weights are not shared with other processes: %s", error)
                    os.close(self._file)
                    return loaded
                del loaded
            fcntl.flock(self._file, fcntl.LOCK_SH)
        model = self._read(*end)
        weakref.finalize(model, os.close, self._file)  # and with it the lock
        return model

    def _end(self) -> tuple[int, int] | None:
        """(where the pickle begins, its length), if the file is complete."""
        size = os.fstat(self._file).st_size
        if size < _END.size:
            return None
        start, length, magic = _END.unpack(os.pread(self._file, _END.size, size - _END.size))
        return (start, length) if magic == _MAGIC else None

    def _fill(self, model: nn.Module) -> None:
        """The model's tensors are moved there one by one: it has none any more."""
        parts = _take_apart(model, self._known)
        size = parts.num_bytes
        os.ftruncate(self._file, 0)  # of who died at it
        os.ftruncate(self._file, size)
        memory = huge_pages.shared(self._file, size, writable=True)
        for span in parts.spans:
            memory[span.offset : span.offset + span.size].copy_(span.content())
            span.release()
        huge_pages.collapse(memory)
        pickled = parts.pickled
        os.pwrite(self._file, pickled, size)
        os.pwrite(self._file, _END.pack(size, len(pickled), _MAGIC), size + len(pickled))

    def _read(self, start: int, length: int) -> Model:
        pickled = os.pread(self._file, length, start)
        memory = huge_pages.shared(self._file, start, writable=False)
        return _Reader(pickled, self._known, memory, self._device).load()


class RestingModel:
    """A model whose tensors wait in host memory; it stays where it is, and so do they in it."""

    @torch.inference_mode()
    def __init__(self, model: Any, known: Mapping[str, Any]) -> None:
        writer = _Writer(io.BytesIO(), known)
        writer.dump(model)
        self._tensors, self._placed = writer.tensors, writer.placed()
        self._spans = []
        for span in writer.spans.values():
            self._spans.append(span.content().to("cpu", copy=True))
            span.release()

    @torch.inference_mode()
    def return_to(self, device: torch.device) -> None:
        spans = [span.to(device, copy=True) for span in self._spans]
        for tensor, (number, offset, dtype, shape, strides, _) in zip(
            self._tensors, self._placed, strict=True
        ):
            tensor.set_(spans[number].untyped_storage(), offset // dtype.itemsize, shape, strides)


@dataclass(eq=False)
class _Span:
    """Bytes of one storage, from address `begin` to `end`, that tensors look at."""

    begin: int
    end: int
    tensors: list[Tensor]
    offset: int = 0  # in the file

    @property
    def size(self) -> int:
        return self.end - self.begin

    def content(self) -> Tensor:
        storage = self.tensors[0].untyped_storage()
        data = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return data.set_(storage, self.begin - storage.data_ptr(), (self.size,), (1,))

    @torch.no_grad()
    def release(self) -> None:
        for tensor in self.tensors:
            tensor.set_(torch.empty(0, dtype=tensor.dtype, device=tensor.device).untyped_storage())


@dataclass
class _Parts:
    pickled: bytes
    spans: list[_Span]
    num_bytes: int  # of all spans in the file


def _take_apart(model: nn.Module, known: Mapping[str, Any]) -> _Parts:
    """Raises what pickling does for a model with parts that another process cannot have."""
    file = io.BytesIO()
    writer = _Writer(file, known)
    writer.dump(model)
    spans, size = list(writer.spans.values()), 0
    for span in spans:
        size += -size % (_LARGE if span.size >= _LARGE else _LINE)
        span.offset, size = size, size + span.size
    header = [(span.offset, span.size) for span in spans]
    return _Parts(pickle.dumps((header, writer.placed(), file.getvalue())), spans, size)


class _Writer(pickle.Pickler):
    """Tensors are numbered, and what is known is named."""

    def __init__(self, file: io.BytesIO, known: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._names = {id(value): name for name, value in known.items()}
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self.spans: dict[int, _Span] = {}  # by the storage's address

    def persistent_id(self, value: Any) -> str | int | None:
        if id(value) in self._names:
            return self._names[id(value)]
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            if value.layout is not torch.strided:
                raise pickle.PicklingError(
                    f"a tensor is laid out by another library ({value.layout})"
                )
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
            begin = value.data_ptr()
            end = begin + _extent(value) * value.itemsize
            storage = value.untyped_storage().data_ptr()
            span = self.spans.setdefault(storage, _Span(begin, end, []))
            span.begin, span.end = min(span.begin, begin), max(span.end, end)
            span.tensors.append(value)
        return self._numbers[id(value)]

    def placed(self) -> list[tuple[Any, ...]]:
        """Of each tensor: its span and where in it, in bytes; dtype, shape, strides; its kind."""
        numbers = {address: i for i, address in enumerate(self.spans)}
        placed = []
        for tensor in self.tensors:
            address = tensor.untyped_storage().data_ptr()
            offset = tensor.data_ptr() - self.spans[address].begin
            form = tensor.dtype, tuple(tensor.shape), tensor.stride()
            placed.append((numbers[address], offset, *form, isinstance(tensor, nn.Parameter)))
        return placed


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


class _Reader(pickle.Unpickler):
    def __init__(
        self, pickled: bytes, known: Mapping[str, Any], memory: Tensor, device: torch.device
    ) -> None:
        header, placed, model = pickle.loads(pickled)
        super().__init__(io.BytesIO(model))
        self._known = known
        spans = [memory[offset : offset + size].to(device) for offset, size in header]
        self._tensors = [_tensor(spans[number], *how) for number, *how in placed]

    def persistent_load(self, name: str | int) -> Any:
        return self._tensors[name] if isinstance(name, int) else self._known[name]


def _tensor(
    span: Tensor,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    is_parameter: bool,
) -> Tensor:
    tensor = torch.empty(0, dtype=dtype, device=span.device)
    start = (span.storage_offset() + offset) // dtype.itemsize
    tensor.set_(span.untyped_storage(), start, shape, strides)
    return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
