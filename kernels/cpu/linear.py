"""Linear layers with weights laid out for oneDNN once, when the model is loaded."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import reference


def pack_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """As `reference.pack_linear`; bfloat16 is reordered to blocks, which F.linear does per call."""
    onednn = torch.ops.mkldnn
    if weight.dtype != torch.bfloat16 or not onednn._is_mkldnn_bf16_supported():
        return reference.pack_linear(weight, bias)
    packed = onednn._reorder_linear_weight(weight)

    def linear(x: Tensor) -> Tensor:
        return onednn._linear_pointwise(x, packed, bias, "none", [], "")

    return linear
