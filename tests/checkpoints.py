"""Tiny random checkpoints in Hugging Face format, made by transformers: the oracle as well."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 320

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.15,
    eos_token_id=2,
    bos_token_id=1,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# name -> (model class, config class, what sets it apart)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(head_dim=32, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(tie_word_embeddings=True)),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE),
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        dict(tie_word_embeddings=False, sliding_window=24, head_dim=16),
    ),
}
# That few tests are about.
_OTHERS = {"gemma": ("GemmaForCausalLM", "GemmaConfig", dict(head_dim=16, pad_token_id=None))}


def make_checkpoint(
    directory: Path, family: str, max_shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Write a random model of a family; one seed, so the same every time.

    With num_labels among the overrides, it is a classifier.
    """
    model_class, config_class, own = (FAMILIES | _OTHERS)[family]
    if "num_labels" in overrides or "id2label" in overrides:
        model_class = model_class.replace("ForCausalLM", "ForSequenceClassification")
    torch.manual_seed(hash_name(family))
    config = getattr(transformers, config_class)(**(_COMMON | own | overrides))
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # else trivial: zeros and ones
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def hash_name(name: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 2**31


def load_oracle(
    directory: Path, dtype: torch.dtype = torch.float32, kind: str = "CausalLM"
) -> PreTrainedModel:
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()
