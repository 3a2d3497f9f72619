"""Products of the linear layers that cuBLAS does not serve.

It chooses among kernels by the number of rows, and they add up in different orders: for bits that
do not depend on who shares the step, Triton multiplies in tiles of one shape. Weights of float8
torch multiplies with inputs rounded, row by row, to as many bits. Those of few bits in groups keep
their bits and are multiplied with inputs as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.cuda.launch import cdiv, launch, next_power_of_2
from kernels.grouped import SUPER_GROUP, GroupedWeight, StoredWeight, alike
from kernels.quantization import FP8_MAX, GROUP, Quantization, quantize_fp8, quantize_int4
from kernels.types import Linear, Rounded

_VALUES = 1 << 24  # of grouped weights, packed at once


def pack_linear(
    weight: Tensor,
    bias: Tensor | None,
    quantization: Quantization | None = None,
    deterministic: bool = False,
) -> Linear:
    """As `kernels.reference.pack_linear`; but the 8 bits of a CPU's head stay 16.

    Args:
        deterministic: multiply each row by the same operations, whatever others there are.
    """
    if deterministic:
        assert quantization is None
        return partial(linear, weight=weight.contiguous(), bias=bias)
    outs, ins = weight.shape
    if quantization == "int4":
        if not _is_multiplied(ins, GROUP):
            raise ValueError(f"quantization: 'int4' needs inputs in multiples of 64, not {ins}")
        return LinearGrouped([StoredWeight((outs, ins), lambda r: quantize_int4(weight[r]))], bias)
    if quantization == "fp8" and outs % 16 == ins % 16 == 0:  # as the library demands
        rounded, of_outs = quantize_fp8(weight)
        return LinearFp8(rounded.t(), of_outs[None, :], bias)
    return reference.pack_linear(weight, bias, None)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, weight, bias, out, num_rows,
    HAS_BIAS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of rows for one of outputs. Neighbours share the weights' tile, which is larger."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_out = rows < num_rows, outs < OUTS
    at_x = x + rows.to(tl.int64)[:, None] * INS
    at_weight = weight + outs.to(tl.int64)[:, None] * INS
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, INS, BLOCK_K):
        ins = first + tl.arange(0, BLOCK_K)
        is_in = ins < INS
        left = tl.load(at_x + ins[None, :], is_row[:, None] & is_in[None, :], 0.0)
        right = tl.load(at_weight + ins[None, :], is_out[:, None] & is_in[None, :], 0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + outs, is_out, 0.0).to(tl.float32)[None, :]
    at_out = out + rows.to(tl.int64)[:, None] * OUTS + outs[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), is_row[:, None] & is_out[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] @ weight [out, in].T + bias [out], each row by the same operations."""
    x = x.contiguous()
    rows, (outs, ins) = x.shape[0], weight.shape
    out = x.new_empty(rows, outs)
    exact = x.itemsize == 4  # for tests: there are no tensor cores
    block_m, block_n, block_k = (16, 32, 32) if exact else (64, 128, 64)
    if rows > 0:
        launch(
            _linear_kernel,
            (cdiv(rows, block_m), cdiv(outs, block_n)),
            x,
            weight,
            weight if bias is None else bias,
            out,
            rows,
            HAS_BIAS=bias is not None,
            OUTS=outs,
            INS=ins,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=4,
            num_stages=4,
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_kernel(
    x, weight, scales, zeros, minimums, super_scales, super_minimums, bias, out, num_rows,
    WIDTH: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    SUPER_GROUP: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows for one of outputs, two runs of inputs at a time: one group, or two."""
    SIGNED: tl.constexpr = tl.int8 if WIDTH == 4 else tl.int16
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_out = (rows < num_rows)[:, None], outs < OUTS
    lanes = tl.arange(0, RUN)
    at_x = x + rows.to(tl.int64)[:, None] * INS + lanes[None, :]
    at_weight = weight + outs.to(tl.int64)[:, None] * (INS * WIDTH // 8) + lanes[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    product, total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for pair in range(INS // (2 * RUN)):
        packed = tl.load(at_weight + pair * RUN * WIDTH // 4, is_out[:, None], 0)
        for half in tl.static_range(2):
            first = (2 * pair + half) * RUN
            at_group, at_block = first // GROUP * OUTS + outs, first // SUPER_GROUP * OUTS + outs
            if WIDTH == 4:
                levels = ((packed >> (4 * half)) & 15).to(SIGNED)
            elif half == 0:
                levels = packed.to(SIGNED)
            else:
                levels = tl.load(at_weight + first, is_out[:, None], 0).to(SIGNED)
            if zeros is not None:
                levels -= tl.load(zeros + at_group, is_out, 0).to(SIGNED)[:, None]
            else:
                levels -= MIDDLE
            own = tl.load(at_x + first, is_row, 0.0)
            product = tl.dot(own, tl.trans(levels.to(own.dtype)), product, input_precision="ieee")
            if minimums is not None:
                total += tl.sum(own.to(tl.float32), 1)
            if RUN == GROUP or half == 1:  # the group ends
                scale = tl.load(scales + at_group, is_out, 0).to(tl.float32)
                if super_scales is not None:
                    scale *= tl.load(super_scales + at_block, is_out, 0).to(tl.float32)
                acc += product * scale[None, :]
                product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if minimums is not None:
                    minimum = tl.load(minimums + at_group, is_out, 0).to(tl.float32)
                    if super_minimums is not None:
                        minimum *= tl.load(super_minimums + at_block, is_out, 0).to(tl.float32)
                    acc += total[:, None] * minimum[None, :]
                    total = tl.zeros([BLOCK_M], tl.float32)
    if bias is not None:
        acc += tl.load(bias + outs, is_out, 0.0).to(tl.float32)[None, :]
    at_out = out + rows.to(tl.int64)[:, None] * OUTS + outs[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), is_row & is_out[None, :])


class LinearGrouped:
    """x [T, in] times a weight [out, in], summed in float32.

    Levels of up to 4 bits take 4 in memory, others 8. A run is a group of up to 32 inputs or half
    of a longer one; of two runs the first lies in the low bits. Scales and the like are
    [groups, out], for programs read those of neighbouring outputs together.

    Args:
        parts: of one layout, one below the other.
    """

    def __init__(self, parts: Sequence[StoredWeight], bias: Tensor | None) -> None:
        first = parts[0].first
        self._bits, self._group = first.bits, first.group
        self._width = 4 if first.bits <= 4 else 8
        self._run = _run(first.group)
        self._shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        self._bias = bias
        found = {field.name: getattr(first, field.name) for field in fields(first)}
        names = [name for name, value in found.items() if isinstance(value, Tensor)]
        tensors: dict[str, list[Tensor]] = {name: [] for name in names}
        for part in parts:
            for rows in torch.arange(part.shape[0]).split(max(_VALUES // part.shape[1], 1)):
                weight = part.rows(rows)
                for name in names:
                    tensor = getattr(weight, name)
                    tensors[name].append(self._pack(tensor) if name == "levels" else tensor)
        self._levels = torch.cat(tensors.pop("levels"))
        self._planes = {name: torch.cat(own).t().contiguous() for name, own in tensors.items()}

    def _pack(self, levels: Tensor) -> Tensor:
        if self._width == 8:
            return levels
        low, high = levels.unflatten(-1, (-1, 2, self._run)).unbind(-2)
        return (low | high << 4).flatten(-2)

    def _unpack(self, packed: Tensor) -> Tensor:
        if self._width == 8:
            return packed
        runs = packed.unflatten(-1, (-1, 1, self._run))
        return torch.cat((runs & 15, runs >> 4), -2).flatten(-3)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, (outs, ins) = len(x), self._shape
        out = x.new_empty(rows, outs)
        few = rows <= 16 or x.itemsize == 4  # which is for tests
        block_m, block_n = (16, 32) if few else (64, 128)
        planes = self._planes
        if rows > 0:
            launch(
                _grouped_kernel,
                (cdiv(rows, block_m), cdiv(outs, block_n)),
                x,
                self._levels,
                planes["scales"],
                planes.get("zeros"),
                planes.get("minimums"),
                planes.get("super_scales"),
                planes.get("super_minimums"),
                self._bias,
                out,
                rows,
                WIDTH=self._width,
                MIDDLE=0 if "minimums" in planes else 1 << (self._bits - 1),
                GROUP=self._group,
                RUN=self._run,
                SUPER_GROUP=SUPER_GROUP,
                OUTS=outs,
                INS=ins,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=4 if few else 8,
                num_stages=4,
            )
        return out


class TableGrouped(LinearGrouped):
    """Implements `kernels.types.Table`."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        planes = {name: plane[:, ids].t() for name, plane in self._planes.items()}
        levels = self._unpack(self._levels[ids])
        return GroupedWeight(levels, self._bits, **planes).values().to(dtype)


def pack_stored(parts: Sequence[Tensor | StoredWeight], bias: Tensor | None) -> Linear | None:
    """See `kernels.ops.Ops`."""
    if not all(
        isinstance(part, Tensor) or _is_multiplied(part.shape[1], part.first.group)
        for part in parts
    ):
        return None
    runs = list(alike(parts))
    if len(runs) == 1 and not isinstance(runs[0], Tensor):
        return (TableGrouped if bias is None else LinearGrouped)(runs[0], bias)
    linears = [
        partial(F.linear, weight=run) if isinstance(run, Tensor) else LinearGrouped(run, None)
        for run in runs
    ]
    return partial(_side_by_side, linears=linears, bias=bias)


def _is_multiplied(inputs: int, group: int) -> bool:
    """Whether they are pairs of runs."""
    return inputs % (2 * _run(group)) == 0


def _run(group: int) -> int:
    return group if group <= 32 else group // 2


def _side_by_side(x: Tensor, linears: Sequence[Linear], bias: Tensor | None) -> Tensor:
    out = torch.cat([linear(x) for linear in linears], 1)
    return out if bias is None else out + bias


@triton.jit
def _round_kernel(x, out, scales, N: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    """A row to 8 bits, in two passes over it, the second of which finds it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * N + columns, columns < N, 0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(value))
    scale = tl.maximum(tl.max(peak, 0), 1e-20) / LIMIT
    tl.store(scales + row, scale)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * N + columns, columns < N, 0.0).to(tl.float32) / scale
        value = tl.clamp(value, -LIMIT, LIMIT).to(out.dtype.element_ty)
        tl.store(out + row * N + columns, value, columns < N)


def round_rows(x: Tensor) -> Rounded:
    """Of x [T, N]."""
    x = x.contiguous()
    (rows, size), out = x.shape, Rounded.empty_like(x)
    block = min(next_power_of_2(size), 4096)
    if rows > 0:
        launch(
            _round_kernel,
            (rows,),
            x,
            out.values,
            out.scales,
            N=size,
            BLOCK=block,
            LIMIT=FP8_MAX,
            num_warps=min(block // 256 or 1, 8),
        )
    return out


@dataclass(frozen=True)
class LinearFp8:
    """x [T, in], its rows rounded to 8 bits, times weight [in, out] with scales [1, out]."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    takes_rounded = True

    def __call__(self, x: Tensor | Rounded) -> Tensor:
        rounded = x if isinstance(x, Rounded) else round_rows(x)
        rows, outs = len(rounded.values), self.weight.shape[1]
        if rows == 0:
            return self.weight.new_empty(0, outs, dtype=x.dtype)
        # Rows that are scaled come out in bfloat16 only.
        out = torch._scaled_mm(
            rounded.values,
            self.weight,
            scale_a=rounded.scales,
            scale_b=self.scales,
            out_dtype=torch.bfloat16,
        ).to(x.dtype)
        return out if self.bias is None else out + self.bias
