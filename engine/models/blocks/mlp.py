"""The gated MLP: down(SiLU(gate(x)) * up(x)) (Shazeer, "GLU Variants", 2020)."""

from dataclasses import dataclass

from torch import Tensor, nn

from engine.models.blocks.attention import check_split
from engine.models.blocks.linear import BuildContext, ColumnLinear, RowLinear


@dataclass(frozen=True)
class GatedMlpConfig:
    intermediate_size: int

    def check_divisible(self, num_ranks: int) -> None:
        check_split("intermediate features", self.intermediate_size, num_ranks)

    def build(self, context: BuildContext) -> "GatedMlp":
        return GatedMlp(self, context)


class GatedMlp(nn.Module):
    def __init__(self, config: GatedMlpConfig, context: BuildContext) -> None:
        super().__init__()
        self._ops = context.ops
        hidden, inner = context.hidden_size, config.intermediate_size
        self.gate_up_proj = ColumnLinear(context, {"gate_proj": inner, "up_proj": inner}, hidden)
        self.down_proj = RowLinear(context, inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._ops.silu_and_mul(self.gate_up_proj(x)))
