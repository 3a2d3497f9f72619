"""config.json means what it means to transformers, or is refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config

from engine.checkpoint.files import CheckpointError
from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.models.registry import read_config
from engine.runner.model_runner import ModelRunner
from tests.checkpoints import _COMMON, VOCAB_SIZE, load_oracle
from tests.engine.helpers import prompt_logits
from tests.models.tiny import save_random, tiny_config

LONG = [1.5 + i / 8 for i in range(8)]  # of 16 dimensions
SHORT = [1.0 + i / 16 for i in range(8)]
LONGROPE: dict[str, Any] = dict(
    rope_type="longrope",
    rope_theta=1000.0,
    short_factor=SHORT,
    long_factor=LONG,
    factor=4.0,
    original_max_position_embeddings=64,
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
# What is put in place -> (family, values, whether our own blocks compute it).
SERVED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "rope_scaling beside rope_parameters": (
        "llama3",
        dict(rope_scaling=dict(rope_type="linear", factor=3.0)),
        True,
    ),
    "llama3 rope, its window elsewhere": (
        "llama3",
        dict(rope_parameters=LLAMA3 | dict(rope_theta=5e3), original_max_position_embeddings=32),
        True,
    ),
    "llama3 rope without its window": (
        "llama3",
        dict(rope_parameters=LLAMA3 | dict(rope_theta=5e3)),
        True,
    ),
    "old spellings": (
        "llama3",
        dict(
            rope_parameters=None,
            rope_theta=5e3,
            rope_scaling=dict(type="linear", factor=3.0),
            dtype=None,
            torch_dtype="float32",
        ),
        True,
    ),
    "windows on a Llama": ("llama3", dict(use_sliding_window=True, sliding_window=8), True),
    "another family's architecture": ("mistral", dict(architectures=["LlamaForCausalLM"]), True),
    "no architecture": ("qwen3", dict(architectures=None), True),
    "swish": ("llama3", dict(hidden_act="swish"), True),
    "gelu": ("llama3", dict(hidden_act="gelu"), False),
    "biases that are not there": ("llama3", dict(attention_bias=True), True),
    "a partial rotary that Llama has not": (
        "llama3",
        dict(partial_rotary_factor=0.5, rope_parameters=dict(rope_type="default", rope_theta=1e3)),
        True,
    ),
    "yarn": (
        "qwen2",
        dict(
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1e3, factor=4.0, original_max_position_embeddings=32
            )
        ),
        True,
    ),
    "dynamic": (
        "llama3",
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e3, factor=4.0)),
        True,
    ),
    "longrope": ("llama3", dict(rope_parameters=LONGROPE), True),
    "no window": ("mistral", dict(sliding_window=None), True),
    "a window by default": ("mistral", dict(sliding_window="(absent)"), True),
    "old Qwen2, layers 1 and 2 slide": (
        "qwen2",
        dict(layer_types=None, use_sliding_window=True, max_window_layers=1, sliding_window=20),
        True,
    ),
    "old Qwen2, none slides": (
        "qwen2",
        dict(layer_types=None, use_sliding_window=False, max_window_layers=1, sliding_window=20),
        True,
    ),
    "torch.float32": ("qwen3", dict(dtype="torch.float32"), True),
    "dtype auto": ("qwen3", dict(dtype="auto"), True),
    "no dtype": ("qwen3", dict(dtype="(absent)"), True),
}


def put(values: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        config.update(values)
        for name, value in values.items():
            if value == "(absent)":
                del config[name]

    return edit


@torch.inference_mode()
def our_logits(directory: Path, tokens: list[int], **options: Any) -> Tensor:
    config = EngineConfig(
        model=str(directory), num_blocks=8, device="cpu", num_threads=1, max_num_seqs=1, **options
    )
    shape = read_config(directory, config.max_model_len)
    runner = ModelRunner(config, shape, directory)
    assert runner.dtype == torch.float32
    return prompt_logits(runner, tokens, [2, 0, 1, 3][: -(-len(tokens) // 32)])


@pytest.mark.parametrize("case", SERVED)
def test_what_transformers_reads_is_what_is_computed(
    edited: Callable[..., Path], case: str
) -> None:
    family, values, is_native = SERVED[case]
    directory = edited(family, config=put(values))
    assert isinstance(read_config(directory), ModelConfig) == is_native
    tokens = [(7 * i) % VOCAB_SIZE for i in range(80)]
    content = json.loads((directory / "config.json").read_text())
    if str(content.get("dtype")) in ("torch.float32", "auto"):  # more than transformers reads
        (directory / "config.json").write_text(json.dumps(content | {"dtype": "float32"}))
    with torch.inference_mode():
        expected = load_oracle(directory)(torch.tensor([tokens])).logits[0, -1]
    (directory / "config.json").write_text(json.dumps(content))
    torch.testing.assert_close(our_logits(directory, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_model_len, length", [(64, 40), (512, 100)])
def test_longrope_takes_the_factors_of_the_longest_text(
    edited: Callable[..., Path], max_model_len: int, length: int
) -> None:
    """So a token's keys are the same however long its text becomes, and whoever shares its step."""
    directory = edited("llama3", config=put(dict(rope_parameters=LONGROPE)))
    tokens = [(7 * i) % VOCAB_SIZE for i in range(length)]
    with torch.inference_mode():
        expected = load_oracle(directory)(torch.tensor([tokens])).logits[0, -1]
    ours = our_logits(directory, tokens, max_model_len=max_model_len)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_a_model_saved_without_its_head_has_its_embedding(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    directory = checkpoints("qwen3")
    model = load_oracle(directory)
    model.base_model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3Model"]
    tokens = [5, 9, 7]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(our_logits(tmp_path, tokens), expected, rtol=0, atol=1e-4)


def test_who_computes_a_model_can_be_chosen(checkpoints: Callable[..., Path]) -> None:
    directory = checkpoints("qwen3")
    assert isinstance(read_config(directory), ModelConfig)
    shape = read_config(directory, model_impl="transformers")
    assert not isinstance(shape, ModelConfig)
    assert shape.description == "qwen3, computed by transformers' own modules"


@pytest.mark.parametrize("max_model_len", [64, 512])
def test_phi4_rotates_a_part_of_each_head(tmp_path: Path, max_model_len: int) -> None:
    """By longrope, which scales what it rotates and nothing else."""
    rope = LONGROPE | dict(partial_rotary_factor=0.75)
    rope |= {name: LONGROPE[name][:6] for name in ("short_factor", "long_factor")}
    hf = Phi3Config(
        **_COMMON, rope_parameters=rope, original_max_position_embeddings=64, pad_token_id=None
    )
    save_random("phi3", hf, tmp_path)
    assert isinstance(read_config(tmp_path), ModelConfig)
    tokens = [(7 * i) % VOCAB_SIZE for i in range(40 if max_model_len == 64 else 100)]
    with torch.inference_mode():
        expected = load_oracle(tmp_path)(torch.tensor([tokens])).logits[0, -1]
    ours = our_logits(tmp_path, tokens, max_model_len=max_model_len)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind, values, longest",
    [
        ("deepseek_v32", dict(index_topk=32), 32),
        ("llama4_text", dict(attention_chunk_size=48), 48),
        ("llama4_text", dict(floor_scale=100), 99),
    ],
)
def test_texts_end_before_attention_is_other_than_causal(
    tmp_path: Path, kind: str, values: dict[str, Any], longest: int
) -> None:
    tiny_config(kind).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | values))
    shape = read_config(tmp_path)
    assert shape.max_position == longest
    assert {cache.window for cache in shape.caches(1)} == {None}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": (
        "qwen3",
        dict(model_type="unheard_of"),
        r"model_type='unheard_of'.*Qwen3ForCausalLM",
    ),
    "none": ("qwen3", dict(model_type=None), "model_type=None"),
    "encoder": ("qwen3", dict(model_type="bert"), "neither causal nor a sliding window"),
    "bidirectional": ("llama3", dict(is_causal=False), "is_causal=False: where tokens see later"),
    "window of 0": ("mistral", dict(sliding_window=0), "sliding_window=0: a token sees itself"),
    "window of -1": ("mistral", dict(sliding_window=-1), "sliding_window=-1"),
    "layer types": ("qwen2", dict(layer_types=["conv", "odd", "moe"]), "layer_types.*odd"),
    "rope": ("llama3", dict(rope_parameters=dict(rope_type="odd", rope_theta=1.0)), "odd"),
    "dtype": ("qwen3", dict(dtype="float99"), "dtype='float99' is no type of torch"),
    "wrong type": ("qwen3", dict(hidden_size="many"), "hidden_size.*many"),
    "heads": ("qwen3", dict(num_key_value_heads=3), r"num_attention_heads \(4\) is no multiple"),
    "bits": (
        "qwen3",
        dict(quantization_config=dict(quant_method="eetq")),
        "eetq.*is not supported; supported: none, compressed-tensors",
    ),
    "mlx": ("qwen3", dict(quantization=dict(bits=4)), "format of MLX, as quantization tells"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(edited: Callable[..., Path], case: str) -> None:
    family, values, message = REFUSED[case]
    directory = edited(family, config=put(values))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(directory)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file, whose",
    [
        ("hf_quant_config.json", "NVIDIA's ModelOpt"),
        ("quantize_config.json", "an old AutoGPTQ"),
        ("quant_config.json", "an old AutoAWQ"),
    ],
)
def test_formats_that_a_file_tells_of_are_named(
    edited: Callable[..., Path], file: str, whose: str
) -> None:
    directory = edited("qwen3")
    (directory / file).write_text('{"bits": 4}')
    with pytest.raises(CheckpointError, match=f"format of {whose}, as {file} tells"):
        read_config(directory)
