"""Prompts as vectors: those that transformers has in float32, however they were computed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from engine import LLM
from engine.checkpoint.files import CheckpointError
from engine.generation_config import EmbeddingConfig, classifier_config, embedding_config
from engine.models.registry import FAMILIES, read_config
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from tests.checkpoints import load_oracle
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, run
from tests.engine.oracle import random_prompts
from tests.models.tiny import save_random, tiny_config

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


# The last computes a token in each step, and has one step in flight while it reads another's.
SIZES: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 48, "max_num_seqs": 16},
    {"max_num_batched_tokens": 1, "max_num_seqs": 1, "async_scheduling": True},
]


@pytest.mark.parametrize("size", SIZES, ids=["chunks", "tokens"])
@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma"])
def test_vectors_are_those_of_transformers(
    checkpoints: CheckpointFactory, family: str, size: dict[str, Any]
) -> None:
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
    with new_engine(checkpoints(family), **size) as engine:
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


# Classifiers

LABELS = {0: "bad", 1: "good", 2: "odd"}


# Heads of transformers for families of our blocks; the first sets, the others with -m slow.
HEADED = sorted(FAMILIES.keys() & MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys())


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("gemma2", "phi3", "qwen2") else pytest.mark.slow)
        for kind in HEADED
    ],
)
def test_labels_get_what_transformers_gives_them(kind: str, tmp_path: Path) -> None:
    """In chunks and one batch, and again where the prefixes are cached."""
    directory = tmp_path / kind
    config = tiny_config(kind)
    config.id2label, config.pad_token_id = LABELS, 0
    if getattr(config, "final_logit_softcapping", None):
        config.final_logit_softcapping = 0.5  # which is for words, and would be felt here
    save_random(kind, config, directory, AutoModelForSequenceClassification)
    oracle = load_oracle(directory, kind="SequenceClassification")
    wanted: dict[str, Tensor] = {}
    for i, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            states = oracle.model(torch.tensor([prompt])).last_hidden_state[0]
            wanted[f"labels{i}"] = oracle(torch.tensor([prompt])).logits[0]
        wanted |= {f"last{i}": states[-1], f"mean{i}": states.mean(0)}
    with new_engine(directory, max_num_batched_tokens=48, max_num_seqs=16) as engine:
        for _ in range(2):
            for name in wanted:
                pooled = name.rstrip("0123456789")
                params = SamplingParams(max_tokens=1, temperature=0, pooling={"kind": pooled})
                prompt = PROMPTS[int(name.removeprefix(pooled))]
                engine.add(Request(name, prompt, params, 0))
            found = {}
            while engine.has_work:
                found |= {delta.request_id: delta.vector for delta in engine.step()}
            for name, vector in wanted.items():
                torch.testing.assert_close(torch.tensor(found[name]), vector, atol=2e-4, rtol=1e-3)
        assert engine.scheduler.stats.cached_tokens > 0
        with pytest.raises(ValueError, match="writes no text"):
            engine.add(Request("text", PROMPTS[0], SamplingParams(), 0))
        with pytest.raises(ValueError, match="writes no text"):
            pooling = {"logits": [300]}
            engine.add(Request("word", PROMPTS[0], SamplingParams(pooling=pooling), 0))


def test_llm_classifies(checkpoints: CheckpointFactory) -> None:
    """A reward model: one label, and a score that may be any number."""
    directory = checkpoints("qwen3", num_labels=1, pad_token_id=0)
    oracle = load_oracle(directory, kind="SequenceClassification")
    with torch.inference_mode():
        rewards = [float(oracle(torch.tensor([p])).logits[0, 0]) for p in PROMPTS[:3]]
    llm = LLM(str(directory), device="cpu", num_threads=1, num_blocks=64, dtype="float32")
    try:
        raw = llm.classify(PROMPTS[:3], use_activation=False, use_tqdm=False)
        shares = llm.classify(PROMPTS[:3], use_tqdm=False)
        with pytest.raises(ValueError, match="writes no text"):
            llm.generate(PROMPTS[:1], use_tqdm=False)
    finally:
        llm.close()
    assert [o.outputs.probs[0] for o in raw] == pytest.approx(rewards, abs=2e-4)
    sigmoids = [1 / (1 + math.exp(-reward)) for reward in rewards]
    assert [o.outputs.probs[0] for o in shares] == pytest.approx(sigmoids, abs=1e-4)
    assert raw[0].outputs.num_classes == 1 and raw[0].prompt_token_ids == PROMPTS[0]


@pytest.mark.parametrize(
    ("config", "activation", "probabilities"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "softmax", [0.8, 0.2]),
        ({"num_labels": 1}, "sigmoid", [0.8]),
        ({"problem_type": "multi_label_classification"}, "sigmoid", [0.8, 0.5]),
        ({"problem_type": "regression", "num_labels": 1}, "none", [math.log(4)]),
        ({"problem_type": "single_label_classification"}, "softmax", [0.8, 0.2]),
    ],
)
def test_the_checkpoints_config_says_what_labels_mean(
    tmp_path: Path, config: dict[str, Any], activation: str, probabilities: list[float]
) -> None:
    content = {"architectures": ["Qwen3ForSequenceClassification"], **config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = classifier_config(tmp_path)
    assert found is not None and found.activation == activation
    assert found.labels == (["a", "b"] if "id2label" in config else found.labels)
    assert len(found.labels) == len(probabilities)
    logits = [math.log(4), 0.0][: len(found.labels)]
    assert found.probabilities(logits) == pytest.approx(probabilities)
    assert all(0 <= p <= 1 for p in found.probabilities([-1e4])) or activation == "none"


def test_what_is_no_classifier_says_so(
    edited: Callable[..., Path], byte_model: Path, checkpoints: CheckpointFactory
) -> None:
    assert classifier_config(byte_model) is None
    with new_engine(checkpoints("qwen3")) as engine, pytest.raises(ValueError, match="is none"):
        params = SamplingParams(max_tokens=1, pooling={"kind": "labels"})
        engine.add(Request("0", PROMPTS[0], params, 0))

    def change(content: dict[str, Any]) -> None:
        content |= {
            "architectures": ["Starcoder2ForSequenceClassification"],
            "model_type": "starcoder2",
        }

    with pytest.raises(CheckpointError, match="classifiers are served where our own blocks"):
        read_config(edited("llama3", config=change))
