"""Triton kernels on the GPU where there is one, else in Triton's interpreter on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl
from triton.runtime import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}


def _mend_interpreter() -> None:
    """Make the interpreter of Triton (3.6 to 3.9) compute what a GPU does.

    It converts arrays of one element with int(), which NumPy 2.4 refuses; it truncates where a GPU
    rounds, to bfloat16 and float8, and takes integers for their bits; and it multiplies matrices of
    bfloat16, which NumPy lacks, by their bit patterns, and others so that what a row gets depends
    on where it is: products are computed in float64 here. A scalar that was compared becomes a
    tensor of integers, no mask.
    """
    builder = interpreter.InterpreterBuilder
    patch, splat, cast, convert = (
        interpreter._patch_lang_tensor,
        builder.create_splat,
        builder.cast_impl,
        builder.create_fp_to_fp,
    )

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        if a.dtype == b.dtype == tl.bfloat16:
            a, b = (cast(self, operand, tl.float32) for operand in (a, b))
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def create_splat(self: Any, result_type: Any, scalar: Any) -> Any:
        result = splat(self, result_type, scalar)
        if scalar.data.dtype == np.bool_:
            return interpreter.TensorHandle(result.data.astype(np.bool_), tl.int1)
        return result

    def rounded(src: Any, dst_type: Any) -> Any | None:
        narrow = _NARROW.get(dst_type.scalar)
        if narrow is not None and src.dtype.scalar.is_int():
            src = cast(builder, src, tl.float32)
        if src.dtype.scalar != tl.float32 or narrow is None:
            return None
        bits = torch.uint8 if narrow.itemsize == 1 else torch.uint16
        data = torch.from_numpy(np.ascontiguousarray(src.data)).to(narrow).view(bits).numpy()
        return interpreter.TensorHandle(data, dst_type.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        result = rounded(src, dst_type)
        return cast(self, src, dst_type) if result is None else result

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        result = rounded(src, dst_type)
        return convert(self, src, dst_type, rounding_mode) if result is None else result

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.create_dot = create_dot
    builder.create_splat = create_splat
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp


if DEVICE.type == "cpu":
    _mend_interpreter()
