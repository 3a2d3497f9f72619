"""Prompts as vectors: those that transformers has in float32, however they were computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM
from engine.checkpoint import CheckpointError
from engine.generation_config import EmbeddingConfig, embedding_config
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from tests.checkpoints import load_oracle
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, run
from tests.engine.oracle import random_prompts

PROMPTS = random_prompts(10, 60)
POOLINGS: dict[str, dict[str, Any]] = {
    "last": {"kind": "last"},
    "mean": {"kind": "mean"},
    "cls": {"kind": "cls"},
    "logits": {"logits": [7, 9, 300]},
}


def expected(oracle: Any, prompt: list[int], name: str) -> Tensor:
    with torch.inference_mode():
        states = oracle.model(torch.tensor([prompt])).last_hidden_state[0]
        if name == "logits":
            return oracle.lm_head(states[-1])[[7, 9, 300]]
    return {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[name]


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_vectors_are_those_of_transformers(checkpoints: CheckpointFactory, family: str) -> None:
    """In chunks, in a batch with requests that generate, and where prefixes are cached."""
    oracle = load_oracle(checkpoints(family))
    requests, wanted = [], {}
    for i, prompt in enumerate(PROMPTS):
        for name, pooling in POOLINGS.items():
            params = SamplingParams(max_tokens=1, temperature=0, pooling=pooling)
            request = Request(f"{i}.{name}", prompt, params, 0)
            requests.append(request)
            wanted[request.id] = expected(oracle, prompt, name)
    plain = [Request(f"{i}", p, SamplingParams(max_tokens=3), 0) for i, p in enumerate(PROMPTS)]
    with new_engine(checkpoints(family), max_num_batched_tokens=48, max_num_seqs=16) as engine:
        for _ in range(2):
            found = {}
            for request in [*requests, *plain]:
                engine.add(request)
            while engine.has_work:
                for delta in engine.step():
                    assert (delta.vector is None) == (delta.request_id not in wanted)
                    found[delta.request_id] = delta.vector
            for name, vector in wanted.items():
                torch.testing.assert_close(torch.tensor(found[name]), vector, atol=2e-4, rtol=2e-4)
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_only_vectors_of_all_tokens_need_all_of_them_computed(
    checkpoints: CheckpointFactory,
) -> None:
    with new_engine(checkpoints("qwen3")) as engine:
        cached = {}
        for name, pooling in POOLINGS.items():
            params = SamplingParams(max_tokens=1, pooling=pooling)
            for attempt in range(2):
                (output,) = run(engine, [Request(f"{name}{attempt}", [5] * 50, params, 0)])
                cached[name] = output.num_cached_tokens
    assert cached["last"] == cached["logits"] > 0 == cached["mean"] == cached["cls"]


def test_llm_embeds(byte_model: Path) -> None:
    oracle = load_oracle(byte_model)
    units = [expected(oracle, prompt, "mean") for prompt in PROMPTS[:3]]
    units = [unit / unit.norm() for unit in units]
    llm = LLM(str(byte_model), device="cpu", num_threads=1, num_blocks=64, dtype="float32")
    try:
        outputs = llm.embed(PROMPTS[:3], "mean", use_tqdm=False)
        with pytest.raises(ValueError, match="not made for embeddings"):
            llm.embed(PROMPTS[:3])
    finally:
        llm.close()
    for output, unit, prompt in zip(outputs, units, PROMPTS, strict=False):
        found = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(found, unit, atol=2e-4, rtol=1e-3)
        assert output.prompt_token_ids == prompt


def test_llm_scores_by_the_angle() -> None:
    llm = LLM("manta-demo", device="cpu", num_threads=1, num_blocks=64)
    try:
        scores = llm.score("apple", ["apple", "river stone"], "last", use_tqdm=False)
    finally:
        llm.close()
    same, other = (output.outputs.score for output in scores)
    assert same == pytest.approx(1, abs=1e-3) and other < 0.99


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="only of the last token"):
        SamplingParams(pooling={"kind": "mean", "logits": [1]})


def test_sentence_transformers_config_says_how_to_pool(tmp_path: Path) -> None:
    assert embedding_config(tmp_path) is None
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}))
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert embedding_config(tmp_path) == EmbeddingConfig("last", True)
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    config.write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert embedding_config(tmp_path) == EmbeddingConfig("mean", False)
    config.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(CheckpointError, match="pooling_mode_max_tokens"):
        embedding_config(tmp_path)
