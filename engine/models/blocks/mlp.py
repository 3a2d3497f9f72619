"""The gated MLP: down(act(gate(x)) * up(x)) (Shazeer, "GLU Variants", 2020)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from engine.models.blocks.linear import BuildContext, ColumnLinear, RowLinear
from engine.models.early import check_split
from kernels.types import Rounded


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
        name = f"{config.activation}_and_mul"
        self._act_and_mul = getattr(ops, name)
        self._act_and_round = getattr(ops.rounding or ops, name)
        maps = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = ColumnLinear(context, maps, hidden, config.bias)
        self.down_proj = RowLinear(context, inner, hidden, config.bias)

    @property
    def takes_rounded(self) -> bool:
        return self.gate_up_proj.takes_rounded

    def forward(self, x: Tensor | Rounded) -> Tensor:
        act = self._act_and_round if self.down_proj.takes_rounded else self._act_and_mul
        return self.down_proj(act(self.gate_up_proj(x)))
