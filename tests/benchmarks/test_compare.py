"""The side-by-side benchmark asks every engine for the same, in its own words."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import compare_vllm
from tests.conftest import CheckpointFactory


def arguments(**changed: Any) -> argparse.Namespace:
    values = dict(seed=0, num_prompts=3, max_input=110, max_output=101, max_num_seqs=4)
    values |= dict(max_num_batched_tokens=300, repeats=2)
    return argparse.Namespace(**values | dict(temperature=0.6) | changed)


def test_workload_is_the_published_one() -> None:
    published = dict(num_prompts=256, max_input=1024, max_output=1024)
    workload = compare_vllm.make_workload(arguments(**published))
    assert sum(workload["output_lengths"]) == 133_966


@dataclass
class Params:
    """nano-vLLM's sampling parameters: it knows no others."""

    temperature: float
    max_tokens: int
    ignore_eos: bool


nano_runner: Any = ModuleType("nanovllm.engine.model_runner")


class NanoLLM:
    def __init__(self, model: str, **config: Any) -> None:
        assert config["max_model_len"] == 211 and config["max_num_seqs"] == 4
        assert config["max_num_batched_tokens"] == 300
        weights = torch.nn.Linear(2, 3)
        nano_runner.load_model(weights, model)
        assert weights.weight.count_nonzero() == 6 and weights.bias.tolist() == [1.0] * 3
        tokenizer = AutoTokenizer.from_pretrained(model)
        assert tokenizer.eos_token_id is not None

    def generate(
        self, prompts: list[list[int]], params: list[Params], use_tqdm: bool
    ) -> list[dict[str, Any]]:
        assert all(isinstance(token, int) for prompt in prompts for token in prompt)
        return [{"text": "", "token_ids": [0] * own.max_tokens} for own in params]


class VLLM:
    def __init__(self, model: str, **config: Any) -> None:
        assert config["load_format"] == "dummy" and not config["enable_prefix_caching"]
        assert config["max_num_batched_tokens"] == 300

    def generate(
        self, prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool
    ) -> list[Any]:
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * own.max_tokens)])
            for own in params
        ]


@pytest.mark.parametrize("package", ["engine", "vllm", "nanovllm", "transformers"])
def test_every_engine_runs_the_workload(
    package: str,
    checkpoints: CheckpointFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, options = str(checkpoints("qwen3", vocab_size=10_001)), {}
    if package == "engine":
        options = {"num_threads": 1}
    elif package != "transformers":
        model = compare_vllm.add_tokenizer(model, tmp_path)
        module: Any = ModuleType(package)
        module.LLM = NanoLLM if package == "nanovllm" else VLLM
        module.SamplingParams = Params if package == "nanovllm" else SimpleNamespace
        monkeypatch.setitem(sys.modules, package, module)
        monkeypatch.setitem(sys.modules, "nanovllm.engine.model_runner", nano_runner)
    workload = compare_vllm.make_workload(arguments())
    compare_vllm.run_here(package, model, workload, options)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(printed.removeprefix("RESULT "))["seconds"] > 0
