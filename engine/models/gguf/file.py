"""A GGUF file, mapped: its metadata, and its tensors as they are stored."""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from engine.checkpoint.files import CheckpointError

_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]  # of its values, as torch has it
    kind: GGMLQuantizationType
    rows: NDArray[np.uint8]  # [..., bytes of a row]


class GgufFile:
    """Raises CheckpointError for a file that is none, or is cut off."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # as torch wants it
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._mapped, self._bytes = mapped, memoryview(mapped)
        self._at = 0
        try:
            magic, version, num_tensors, num_fields = self._unpack("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"begins with {magic!r}, version {version}")
            self.metadata: dict[str, Any] = {}
            for _ in range(num_fields):
                name = self._string()
                self.metadata[name] = self._value(GGUFValueType(self._unpack("I")[0]))
            table = [self._entry() for _ in range(num_tensors)]
            alignment = self.metadata.get("general.alignment", 32)
            start = -(-self._at // alignment) * alignment
            self.tensors = {
                name: self._tensor(shape, kind, start + offset)
                for name, shape, kind, offset in table
            }
        except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is no GGUF file that can be read: {error}") from error

    def let_go(self) -> None:
        """Of pages that were read: they count as this process's, and it has packed them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        self._at += length
        return str(self._bytes[self._at - length : self._at], "utf-8")

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._unpack(_FORMATS[kind])[0]
        element, count = self._unpack("IQ")
        if element in _FORMATS:
            return list(self._unpack(f"{count}{_FORMATS[GGUFValueType(element)]}"))
        return [self._value(GGUFValueType(element)) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string()
        (num_dims,) = self._unpack("I")
        shape = tuple(reversed(self._unpack(f"{num_dims}Q")))
        kind, offset = self._unpack("IQ")
        return name, shape, GGMLQuantizationType(kind), offset

    def _tensor(
        self, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int
    ) -> StoredTensor:
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        stored = (*shape[:-1], shape[-1] // per_block * block_bytes)
        end = start + int(np.prod(stored))
        if end > len(self._bytes):
            raise ValueError("it is cut off")
        rows = np.frombuffer(self._bytes[start:end], dtype=np.uint8)
        return StoredTensor(shape, kind, rows.reshape(stored))
