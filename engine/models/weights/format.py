"""What a format of weights has to know: which tensors there are, and what they make up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import Ops
from kernels.types import Linear


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a linear map [out, in], as the checkpoint has it.

    A rank's share of the outputs or inputs is cut along the dimension in which they lie.
    """

    name: str  # after the map's own
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: any floating-point type, converted to the model's
    out_dim: int | None  # None: the same for all outputs
    in_dim: int | None
    outs_per_entry: int = 1  # outputs that an entry along out_dim holds
    ins_per_entry: int = 1


class WeightFormat(Protocol):
    def tensors(self, out_features: int, in_features: int) -> Sequence[StoredTensor]:
        """What the checkpoint has of one linear map; a bias is not among them."""

    def pack(
        self, ops: Ops, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """The map that these tensors, by name, stand for: in the layout of the device's kernels.

        They may be of several maps with the same inputs, one below the other along out_dim, and
        are not needed any more. Inputs and outputs are of this dtype.
        """
