"""Quantized linear layers: close to the full model, and one copy of each weight."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from tests.checkpoints import VOCAB_SIZE, make_checkpoint


def prompt_logits(directory: Path, quantization: str | None) -> Tensor:
    """Float32 logits [vocab] after one prompt."""
    config = EngineConfig(
        model=str(directory),
        dtype="bfloat16",
        device="cpu",
        num_blocks=8,
        quantization=quantization,  # type: ignore[arg-type]
    )
    engine = Engine(config)
    runner = engine.runner
    assert {n.rpartition(".")[0] for n, p in runner.model.named_parameters() if p.dim() == 2} <= {
        "model.embed_tokens"
    }
    seen = []
    sample = runner.ops.sampling.sample

    def record(logits: Tensor, *arguments: Tensor) -> Tensor:
        seen.append(logits.float())
        return sample(logits, *arguments)

    runner.ops.sampling.sample = record
    prompt = torch.randint(3, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(0))
    engine.add(Request("0", prompt.tolist(), SamplingParams(temperature=0, max_tokens=1), 0))
    while engine.has_work:
        engine.step()
    engine.close()
    return seen[0][0]


@pytest.mark.parametrize(("quantization", "similarity"), [("w8a8", 0.99), ("int4", 0.9)])
def test_logits_stay_close(tmp_path: Path, quantization: str, similarity: float) -> None:
    directory = make_checkpoint(tmp_path, "llama3")
    full, rounded = prompt_logits(directory, None), prompt_logits(directory, quantization)
    assert not torch.equal(full, rounded)
    assert torch.cosine_similarity(full, rounded, dim=0) > similarity
