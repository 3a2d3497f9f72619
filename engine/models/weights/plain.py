"""Weights in floating point, which may be rounded when they are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.weights.format import StoredTensor
from kernels import Ops
from kernels.quantization import Quantization
from kernels.types import Linear


@dataclass(frozen=True)
class PlainWeights:
    quantization: Quantization | None = None

    def tensors(self, out_features: int, in_features: int) -> Sequence[StoredTensor]:
        return [StoredTensor("weight", (out_features, in_features), None, out_dim=0, in_dim=1)]

    def pack(
        self, ops: Ops, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        return ops.pack_linear(tensors["weight"], bias, self.quantization)
