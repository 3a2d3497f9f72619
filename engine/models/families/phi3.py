"""Phi-3 and Phi-4 (Abdin et al., 2024): fused maps, and a part of each head may stand still."""

from transformers import PreTrainedConfig

from engine.models.blocks.rotary import RopeConfig
from engine.models.config import ModelConfig, dense_config, head_dim_of, sliding_windows
from engine.models.rewrite import Rewrites, parts


def config(hf: PreTrainedConfig) -> ModelConfig:
    head_dim, inner = head_dim_of(hf), hf.intermediate_size
    size, kv_size = hf.num_attention_heads * head_dim, hf.num_key_value_heads * head_dim
    rope = RopeConfig.of(hf, head_dim, is_partial=True)
    fused = parts("qkv_proj", {"q_proj": size, "k_proj": kv_size, "v_proj": kv_size})
    return dense_config(
        hf,
        windows=sliding_windows(hf, ["sliding_attention"] * hf.num_hidden_layers),
        ropes=[rope] * hf.num_hidden_layers,
        rewrites=Rewrites(fused | parts("gate_up_proj", {"gate_proj": inner, "up_proj": inner})),
    )
