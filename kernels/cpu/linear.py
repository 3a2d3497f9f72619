"""Linear layers whose weights are laid out once, when the model is loaded."""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.cpu import huge_pages
from kernels.cpu.build import load_library
from kernels.cpu.library import DTYPES, declare
from kernels.cpu.recorder import empty
from kernels.grouped import GroupedWeight, StoredWeight, alike
from kernels.quantization import GROUP, Quantization, quantize_int4, quantize_int8
from kernels.types import Linear

_SIZES = [c_int64] * 4  # rows, inputs, outputs, and how far apart the rows of `out` are
_LAYOUT = [c_int] * 4  # of groups: see levels.h
_SIGNATURES = {
    "pack_weight": [c_int, c_void_p, c_int64, c_int64, c_void_p],
    "pack_levels": [*_LAYOUT, c_void_p, *[c_int64] * 3, c_void_p],
    "pack_scales": [*_LAYOUT, c_void_p, *[c_int64] * 6, c_void_p],
    # dtype, x, what the weight is made of, bias, out
    "linear": [c_int, c_void_p, c_void_p, c_void_p, c_void_p, *_SIZES],
    "linear_int8": [c_int, c_void_p, *[c_void_p] * 3, c_void_p, c_void_p, *_SIZES],
    "linear_groups": [c_int, c_void_p, *_LAYOUT, c_void_p, c_void_p, c_void_p, *_SIZES],
    # dtype, ids and how many, what the weight is made of, out, inputs
    "linear_rows": [c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int64],
    "linear_groups_rows": [c_int, c_void_p, c_int64, *_LAYOUT, c_void_p, c_void_p, c_int64],
}
_VALUES = 1 << 22  # taken apart at once
_SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.int8: 2}


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


@dataclass(frozen=True)
class _Product:
    """Of some outputs: the library's function, and what it takes between x and the bias.

    And the one that gives rows of the weight, where it has its values.
    """

    run: Callable[..., None]
    outputs: int
    weight: tuple[Tensor | int, ...]
    rows: Callable[..., None] | None = None

    def addresses(self) -> list[int]:
        return [part.data_ptr() if isinstance(part, Tensor) else part for part in self.weight]

    def __reduce__(self) -> tuple[Callable[..., "_Product"], tuple[Any, ...]]:
        rows = self.rows.__name__ if self.rows else None
        return _product, (self.run.__name__, self.outputs, self.weight, rows)


def _product(
    name: str, outputs: int, weight: tuple[Tensor | int, ...], rows: str | None
) -> _Product:
    """By the same library, in a process that has loaded it too."""
    library = load_library()
    found = None if rows is None else getattr(library, rows)
    return _Product(getattr(library, name), outputs, weight, found)


class PackedLinear:
    """A linear layer that holds its weight in the layouts of the library's functions."""

    def __init__(self, inputs: int, products: Sequence[_Product], bias: Tensor | None) -> None:
        self._made_of = inputs, products, bias
        self._inputs = inputs
        self._outputs = sum(product.outputs for product in products)
        self._products = products
        sizes = [product.outputs for product in products]
        self._biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        self._parts = []
        start = 0
        for product, own in zip(products, self._biases, strict=True):
            arguments = [*product.addresses(), None if own is None else own.data_ptr()]
            self._parts.append((product, arguments, start))
            start += product.outputs

    def __reduce__(self) -> tuple[type["PackedLinear"], tuple[Any, ...]]:
        return type(self), self._made_of

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = empty((x.shape[0], self._outputs), x.dtype)
        for product, arguments, start in self._parts:
            part = out[:, start:] if start else out
            product.run(
                DTYPES[x.dtype],
                x.data_ptr(),
                *arguments,
                part.data_ptr(),
                x.shape[0],
                self._inputs,
                product.outputs,
                self._outputs,
            )
        return out


class PackedTable(PackedLinear):
    """One whose weight is whole, so that it can be an embedding as well; see `types.Table`."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        (product,) = self._products
        assert product.rows is not None
        out = empty((len(ids), self._inputs), dtype)
        product.rows(
            DTYPES[dtype],
            ids.data_ptr(),
            len(ids),
            *product.addresses(),
            out.data_ptr(),
            self._inputs,
        )
        return out


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
        if quantization == "w8a8":
            missing = -inputs % 64  # which the kernel takes at once
            product = self._int8(F.pad(weight, (0, missing)) if missing else weight)
            linear = _packed(inputs + missing, [product], bias)
            return partial(_padded, linear, missing) if missing else linear
        if quantization == "int4":
            if inputs % GROUP:
                raise ValueError(
                    f"quantization: 'int4' needs inputs in multiples of {GROUP}, not {inputs}"
                )
            rounded = StoredWeight((len(weight), inputs), lambda rows: quantize_int4(weight[rows]))
            product = replace(self._groups([rounded]), rows=None)
        elif quantization is None and _is_packable(weight):
            product = self._plain(weight)
        else:
            return pack_linear_onednn(weight, bias, quantization)
        return _packed(inputs, [product], bias)

    def pack_stored(
        self, parts: Sequence[Tensor | StoredWeight], bias: Tensor | None
    ) -> Linear | None:
        """See `kernels.ops.Ops`."""
        inputs = parts[0].shape[1]
        if not all(isinstance(p, StoredWeight) or _is_packable(p) for p in parts):
            return None
        products = [
            self._plain(run) if isinstance(run, Tensor) else self._groups(run)
            for run in alike(parts)
        ]
        return _packed(inputs, products, bias)

    def _num_panels(self, outputs: int) -> int:
        return -(-outputs // self._columns)

    def _plain(self, weight: Tensor) -> _Product:
        packed, library = self._pack_panels(weight), self._library
        return _Product(library.manta_linear, len(weight), (packed,), library.manta_linear_rows)

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

    def _int8(self, weight: Tensor) -> _Product:
        quantized, scales = quantize_int8(weight)
        sums = quantized.sum(-1, dtype=torch.int32)
        parts = self._pack_panels(quantized), scales, sums
        return _Product(self._library.manta_linear_int8, len(weight), parts)

    def _groups(self, parts: Sequence[StoredWeight]) -> _Product:
        """Weights of one layout below each other, as levels.h has them; some rows at a time."""
        outputs, inputs = sum(part.shape[0] for part in parts), parts[0].shape[1]
        layout, each = _layout(parts[0].first)
        padded = self._num_panels(outputs) * self._columns
        packed = huge_pages.empty((padded * each,), torch.uint8)
        step, first = max(_VALUES // inputs, 1), 0
        for part in parts:
            for rows in torch.arange(part.shape[0]).split(step):
                self._pack_rows(layout, part.rows(rows), first, packed)
                first += len(rows)
        library = self._library
        weight: tuple[Tensor | int, ...] = (*layout, packed)
        rows_of = library.manta_linear_groups_rows
        return _Product(library.manta_linear_groups, outputs, weight, rows_of)

    def _pack_rows(
        self, layout: tuple[int, ...], weight: GroupedWeight, first: int, packed: Tensor
    ) -> None:
        outputs, inputs = weight.shape
        shape = first, outputs, inputs, packed.data_ptr()
        levels = weight.levels.contiguous()
        self._library.manta_pack_levels(*layout, levels.data_ptr(), *shape)
        blocks = inputs // weight.common
        offset = 0  # in a block, of one output
        for plane in _planes(weight):
            each = plane.shape[1] // blocks
            self._library.manta_pack_scales(
                *layout, plane.data_ptr(), plane.itemsize, each, offset, *shape
            )
            offset += each * plane.itemsize


def _planes(weight: GroupedWeight) -> list[Tensor]:
    """What a block has behind its levels, in order."""
    zeros = weight.zeros  # from the middle on
    if zeros is not None:
        zeros = (zeros.int() - (1 << (weight.bits - 1))).to(torch.int8)
    in_order = weight.scales, weight.minimums, zeros, weight.super_scales, weight.super_minimums
    return [plane.contiguous() for plane in in_order if plane is not None]


def _layout(weight: GroupedWeight) -> tuple[tuple[int, ...], int]:
    """Of levels.h, and bytes of an output."""
    second = 1 if weight.minimums is not None else 2 if weight.zeros is not None else 0
    layout = weight.bits, weight.group, _SCALES[weight.scales.dtype], second
    of_levels = weight.shape[1] * weight.bits // 8
    return layout, of_levels + sum(plane[0].nbytes for plane in _planes(weight))


def _packed(inputs: int, products: list[_Product], bias: Tensor | None) -> PackedLinear:
    is_table = len(products) == 1 and products[0].rows is not None and bias is None
    return (PackedTable if is_table else PackedLinear)(inputs, products, bias)


def _padded(linear: Linear, missing: int, x: Tensor) -> Tensor:
    """Of x with so many zeros behind its values."""
    return linear(F.pad(x, (0, missing)))


def _is_packable(weight: Tensor) -> bool:
    return weight.dtype in DTYPES and weight.shape[1] * weight.itemsize % 4 == 0
