"""A family is a small file and a line in the registry; here one whose blocks are not all known."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from engine.models import registry
from engine.models.blocks.linear import BuildContext, ColumnLinear, RowLinear
from engine.models.config import ModelConfig, dense_config
from engine.models.early import check_split
from tests.checkpoints import _COMMON, load_oracle
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.oracle import greedy_text, random_prompts

# --- The family: Arcee, a Llama whose MLP has no gate -----------------------------------------


@dataclass(frozen=True)
class SquaredReluConfig:
    intermediate_size: int

    def check_divisible(self, num_ranks: int) -> None:
        check_split("intermediate features", self.intermediate_size, num_ranks)

    def build(self, context: BuildContext) -> nn.Module:
        return SquaredRelu(self.intermediate_size, context)


class SquaredRelu(nn.Module):
    def __init__(self, inner: int, context: BuildContext) -> None:
        super().__init__()
        self.up = ColumnLinear(context, {"up_proj": inner}, context.hidden_size)
        self.down_proj = RowLinear(context, inner, context.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up(x).relu().square())


def config(hf: PreTrainedConfig) -> ModelConfig:
    return dense_config(hf, mlp=SquaredReluConfig(hf.intermediate_size))


# --- What it takes to have it -----------------------------------------------------------------


@pytest.fixture
def arcee(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    hf = transformers.ArceeConfig(**_COMMON, tie_word_embeddings=False)
    transformers.ArceeForCausalLM(hf).save_pretrained(tmp_path)
    return tmp_path


def test_without_it_transformers_module_computes_the_model(arcee: Path) -> None:
    assert not isinstance(registry.read_config(arcee), ModelConfig)


def test_a_line_in_the_registry_serves_it_as_transformers_does(
    arcee: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.FAMILIES, "arcee", config)
    assert isinstance(registry.read_config(arcee), ModelConfig)
    text = greedy_text(load_oracle(arcee), random_prompts(24, 60), 12)
    with new_engine(arcee) as engine:
        outputs = run(engine, new_requests(text.prompts, max_tokens=12, ignore_eos=True))
    assert len(text.prompts) > 10
    assert tokens_of(outputs) == text.outputs
