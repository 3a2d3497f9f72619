"""EXAONE 3 (LG, 2024), a Llama by other names, and EXAONE 4 (2025)."""

from transformers import PreTrainedConfig

from engine.models.blocks.layer import NORMS_AFTER
from engine.models.blocks.rotary import RopeConfig
from engine.models.config import ModelConfig, dense_config, head_dim_of, sliding_windows
from engine.models.rewrite import Rewrites

_NAMES = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.ln_f.", "model.norm."),
    ("transformer.h.", "model.layers."),
    (".attn.attention.out_proj.", ".self_attn.o_proj."),
    (".attn.attention.", ".self_attn."),
    (".ln_1.", ".input_layernorm."),
    (".ln_2.", ".post_attention_layernorm."),
    (".mlp.c_fc_0.", ".mlp.gate_proj."),
    (".mlp.c_fc_1.", ".mlp.up_proj."),
    (".mlp.c_proj.", ".mlp.down_proj."),
)


def config(hf: PreTrainedConfig) -> ModelConfig:
    bias = hf.attention_bias
    return dense_config(hf, rewrites=Rewrites(names=_NAMES), qkv_bias=bias, output_bias=bias)


def config_exaone4(hf: PreTrainedConfig) -> ModelConfig:
    """Norms behind attention and MLP; where there are windows, what sees all knows no positions."""
    windows = sliding_windows(hf, hf.layer_types)
    rope, none = RopeConfig.of(hf, head_dim_of(hf)), RopeConfig.none(head_dim_of(hf))
    has_rope = [hf.sliding_window is None or window is not None for window in windows]
    return dense_config(
        hf,
        windows=windows,
        ropes=[rope if has else none for has in has_rope],
        norms=NORMS_AFTER,
        qk_norm="of heads",
    )
