"""A tiny random checkpoint of every decoder that transformers knows, made when it is asked for."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.checkpoints import VOCAB_SIZE, hash_name

# What the mapping has besides decoders of text: parts of encoders and decoders, models of images or
# sounds, and names under which a text model comes with them.
_NOT_DECODERS = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert
data2vec-text electra ernie git marian mbart megatron-bert mvp pegasus plbart prophetnet rembert
reformer roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta
xlm-roberta-xl xlnet xmod musicgen musicgen_melody moshi mllama fuyu got_ocr2 emu3
moss_transcribe_diarize phi4_multimodal gemma3 gemma3n gemma4 gemma4_unified gemma4_assistant
gemma4_unified_assistant qwen3_5 qwen3_5_moe qwen4_exp llama4 dots3_note cpmant blt
"""
KINDS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(_NOT_DECODERS.split()))

_SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.15,
    pad_token_id=None,
    eos_token_id=2,
    bos_token_id=1,
    sliding_window=24,
    moe_intermediate_size=32,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    shared_expert_intermediate_size=32,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    ffn_hidden_size=96,
    ffn_dim=96,
    embedding_size=64,
    word_embed_proj_dim=64,
    d_ff=96,
    # Mamba's and linear attention's
    mamba_d_state=8,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_n_groups=1,
    state_size=8,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
# Of single kinds, what the above does not settle.
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": dict(query_pre_attn_scalar=16, attn_logit_softcapping=5.0),
    "falcon": dict(alibi=False, new_decoder_architecture=False, multi_query=True),
    "bloom": dict(seq_length=512),
    "mpt": dict(d_model=64, n_heads=4, n_layers=4, max_seq_len=512),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=24),
    "modernbert-decoder": dict(pad_token_id=0, cls_token_id=1, sep_token_id=2, local_attention=24),
    "codegen": dict(rotary_dim=8),
    "gptj": dict(rotary_dim=8),
    "dots1": dict(n_shared_experts=1),
    "gemma3n_text": dict(num_kv_shared_layers=0, layer_types=None),
    "cohere_compass_text": dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="default", rope_theta=1e4, mrope_section=[3, 3, 2])
        )
    ),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "bamba": dict(mamba_chunk_size=16, attn_layer_indices=[1, 3]),
    "granitemoehybrid": dict(mamba_chunk_size=16, layer_types=["mamba", "attention"] * 2),
    "falcon_h1": dict(mamba_chunk_size=16, mamba_d_ssm=128),
    "nemotron_h": dict(
        chunk_size=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=8, n_groups=1
    ),
    "mamba2": dict(chunk_size=16, num_heads=8, head_dim=16, n_groups=1),
    "zamba2": dict(chunk_size=16, layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
    "kimi_linear": dict(
        linear_head_dim=16,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "dbrx": dict(
        d_model=64,
        n_heads=4,
        n_layers=4,
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
}


def tiny_config(kind: str) -> PreTrainedConfig:
    """Of a small model of this model_type; where that cannot be, what it is by default."""
    config_class = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config_class)} | set(
        config_class.attribute_map
    )
    values = {name: value for name, value in _SMALL.items() if name in known}
    if "qk_rope_head_dim" in values:  # latent attention: queries have as many keys
        values |= dict(head_dim=values["qk_rope_head_dim"], num_key_value_heads=4)
    try:
        return config_class(**values | _OWN.get(kind, {}))
    except Exception:  # of whatever kind its checks are
        return config_class()


def save_random(
    kind: str, config: PreTrainedConfig, directory: Path, head: Any = AutoModelForCausalLM
) -> None:
    """Write a checkpoint with random weights; the same every time."""
    torch.manual_seed(hash_name(kind))
    model = head.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # else trivial: zeros and ones
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
