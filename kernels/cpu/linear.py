"""Linear layers whose weights are laid out once, when the model is loaded."""

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import huge_pages
from kernels.cpu.build import load_library
from kernels.cpu.library import DTYPES, declare
from kernels.cpu.recorder import empty
from kernels.quantization import GROUP, Quantization, quantize_int4, quantize_int8
from kernels.types import Linear

_SIZES = [c_int64] * 3  # rows, inputs, outputs
_SIGNATURES = {
    "pack_weight": [c_int, c_void_p, c_int64, c_int64, c_void_p],
    "pack_int4": [c_void_p, c_void_p, c_int64, c_int64, c_void_p],
    # dtype, x, what the weight is made of, bias, out
    "linear": [c_int, c_void_p, c_void_p, c_void_p, c_void_p, *_SIZES],
    "linear_int8": [c_int, c_void_p, *[c_void_p] * 3, c_void_p, c_void_p, *_SIZES],
    "linear_int4": [c_int, c_void_p, c_void_p, c_void_p, c_void_p, *_SIZES],
}


def pack_linear_onednn(
    weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None
) -> Linear:
    """As `reference.pack_linear`; bfloat16 is reordered to blocks, which F.linear does per call."""
    onednn = torch.ops.mkldnn
    if quantization or weight.dtype != torch.bfloat16 or not onednn._is_mkldnn_bf16_supported():
        return reference.pack_linear(weight, bias, quantization)
    packed = onednn._reorder_linear_weight(weight)

    def linear(x: Tensor) -> Tensor:
        return onednn._linear_pointwise(x, packed, bias, "none", [], "")

    return linear


class PackedLinear:
    """A linear layer that holds its weight in the layout of one of the library's functions."""

    def __init__(
        self,
        run: Callable[..., None],
        shape: tuple[int, int],
        weight: tuple[Tensor, ...],
        bias: Tensor | None,
    ) -> None:
        self._run = run
        self._outputs, self._inputs = shape
        self._tensors = (*weight, bias)  # kept alive for their addresses
        self._pointers = [None if t is None else t.data_ptr() for t in self._tensors]

    def __reduce__(self) -> tuple[Callable[..., "PackedLinear"], tuple[Any, ...]]:
        *weight, bias = self._tensors
        return _packed_before, (self._run.__name__, (self._outputs, self._inputs), weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows = x.shape[0]
        out = empty((rows, self._outputs), x.dtype)
        self._run(
            DTYPES[x.dtype],
            x.data_ptr(),
            *self._pointers,
            out.data_ptr(),
            rows,
            self._inputs,
            self._outputs,
        )
        return out


def _packed_before(
    name: str, shape: tuple[int, int], weight: list[Tensor], bias: Tensor | None
) -> PackedLinear:
    """By the same library, in a process that has loaded it too."""
    return PackedLinear(getattr(load_library(), name), shape, (*weight,), bias)


class LinearPacker:
    """Packs weights for the matrix products of a loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        library.manta_panel_columns.restype = c_int64
        self._columns = library.manta_panel_columns()
        self._library = library

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None
    ) -> Linear:
        """As `reference.pack_linear`."""
        inputs = weight.shape[1]
        if quantization == "w8a8" and inputs % 64 == 0:
            return self._pack_int8(weight, bias)
        if quantization == "int4" and inputs % GROUP == 0:
            return self._pack_int4(weight, bias)
        if quantization is None and weight.dtype in DTYPES and inputs * weight.itemsize % 4 == 0:
            panels = self._pack_panels(weight)
            return PackedLinear(self._library.manta_linear, (*weight.shape,), (panels,), bias)
        return pack_linear_onednn(weight, bias, quantization)

    def _num_panels(self, outputs: int) -> int:
        return -(-outputs // self._columns)

    def _pack_panels(self, weight: Tensor) -> Tensor:
        """weight [out, in] in the layout of matmul.h, whatever its type."""
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        size = self._num_panels(outputs) * self._columns * inputs
        packed = huge_pages.empty((size,), weight.dtype)
        self._library.manta_pack_weight(
            DTYPES.get(weight.dtype, DTYPES[torch.float32]),  # bytes stay four by four
            weight.data_ptr(),
            outputs,
            inputs * weight.itemsize // 4,
            packed.data_ptr(),
        )
        return packed

    def _pack_int8(self, weight: Tensor, bias: Tensor | None) -> Linear:
        quantized, scales = quantize_int8(weight)
        sums = quantized.sum(-1, dtype=torch.int32)
        panels = self._pack_panels(quantized)
        run = self._library.manta_linear_int8
        return PackedLinear(run, (*weight.shape,), (panels, scales, sums), bias)

    def _pack_int4(self, weight: Tensor, bias: Tensor | None) -> Linear:
        outputs, inputs = weight.shape
        quantized, scales = quantize_int4(weight)
        group_bytes = self._columns * (GROUP // 2 + scales.itemsize)
        size = self._num_panels(outputs) * (inputs // GROUP) * group_bytes
        packed = huge_pages.empty((size,), torch.uint8)
        self._library.manta_pack_int4(
            quantized.data_ptr(), scales.data_ptr(), outputs, inputs, packed.data_ptr()
        )
        run = self._library.manta_linear_int4
        return PackedLinear(run, (outputs, inputs), (packed,), bias)
