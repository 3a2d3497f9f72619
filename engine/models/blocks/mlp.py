"""The gated MLP: down(act(gate(x)) * up(x)) (Shazeer, "GLU Variants", 2020)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from engine.models.blocks.attention import check_split
from engine.models.blocks.linear import BuildContext, ColumnLinear, RowLinear


@dataclass(frozen=True)
class GatedMlpConfig:
    intermediate_size: int
    activation: Literal["silu", "gelu"] = "silu"  # GELU by its approximation with tanh
    bias: bool = False

    def check_divisible(self, num_ranks: int) -> None:
        check_split("intermediate features", self.intermediate_size, num_ranks)

    def build(self, context: BuildContext) -> "GatedMlp":
        return GatedMlp(self, context)


class GatedMlp(nn.Module):
    def __init__(self, config: GatedMlpConfig, context: BuildContext) -> None:
        super().__init__()
        ops, hidden, inner = context.ops, context.hidden_size, config.intermediate_size
        self._act_and_mul = {"silu": ops.silu_and_mul, "gelu": ops.gelu_and_mul}[config.activation]
        maps = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = ColumnLinear(context, maps, hidden, config.bias)
        self.down_proj = RowLinear(context, inner, hidden, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._act_and_mul(self.gate_up_proj(x)))
