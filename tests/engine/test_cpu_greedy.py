"""On the C++ kernels, the engine's greedy tokens are those of transformers."""

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from tests.checkpoints import FAMILIES, VOCAB_SIZE, load_oracle, make_checkpoint
from tests.engine.helpers import run, tokens_of


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(tmp_path: Path, family: str) -> None:
    directory = make_checkpoint(tmp_path / family, family)
    config = EngineConfig(
        model=str(directory),
        dtype="float32",
        device="cpu",
        max_num_seqs=4,
        max_num_batched_tokens=48,  # prompts in chunks, beside single queries
        max_model_len=256,
        block_size=16,
    )
    engine = Engine(config)
    assert engine.runner.ops.name.startswith("cpu-")
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in (1, 17, 60, 130, 5)
    ]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    requests = [Request(str(i), prompt, params, 0) for i, prompt in enumerate(prompts)]
    outputs = tokens_of(run(engine, requests))
    oracle = load_oracle(directory)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + output])).logits[0]
        assert output == logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
