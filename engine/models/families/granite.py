"""Granite (IBM, 2024): a Llama with four multipliers, which its weights can carry."""

from transformers import PreTrainedConfig

from engine.models.config import ModelConfig, dense_config
from engine.models.rewrite import Rewrite, Rewrites


def config(hf: PreTrainedConfig) -> ModelConfig:
    # Of embeddings that may be the head's as well, which is taken back.
    embedding = Rewrite(times=hf.embedding_multiplier)
    branch = Rewrite(times=hf.residual_multiplier)
    rewrites = {
        "embed_tokens": embedding,
        "lm_head": embedding,
        "o_proj": branch,
        "down_proj": branch,
    }
    return dense_config(
        hf,
        rewrites=Rewrites(rewrites),
        logit_scale=1 / (hf.embedding_multiplier * hf.logits_scaling),
        scale=hf.attention_multiplier,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
    )
