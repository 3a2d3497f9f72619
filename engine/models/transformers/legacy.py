"""Old modules of transformers that attend by themselves: here it goes through the interface.

Their masks are causal, or a window. Where scores fall with the distance of tokens (ALiBi: Press et
al., 2022), `slopes` say by how much for each head.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from engine.checkpoint.files import CheckpointError
from engine.models.transformers.interface import NAME, attend


def go_through_interface(model: PreTrainedModel) -> None:
    """Let those of the model's modules that are known here be answered as all others are."""
    for module in model.modules():
        if (found := _METHODS.get(type(module).__name__)) is not None:
            name, method = found
            setattr(module, name, partial(method, module))
            model.config._attn_implementation = NAME  # transformers says they cannot


def _gpt_neo(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, None]:
    window = module.config.window_size if module.attention_type == "local" else None
    out, weights = attend(module, q, k, v, None, scaling=1.0, sliding_window=window)
    return out.transpose(1, 2), weights


def _gpt_neox_japanese(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, None]:
    out, weights = attend(module, q, k, v, None)
    return out.transpose(1, 2), weights


def _openai_gpt(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[Tensor]:
    out, _weights = attend(module, q, k.mT, v, None, scaling=None if module.scale else 1.0)
    return [out.transpose(1, 2)]


def _falcon(
    module: Any,
    x: Tensor,
    alibi: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if alibi is not None or position_embeddings is None:
        raise CheckpointError("FalconAttention adds to scores by distance (ALiBi), eagerly twice")
    q, k, v = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(x)))
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    q, k = rotate(q, k, *position_embeddings)
    out, weights = attend(module, q, k, v, None)
    return module.dense(out.flatten(2)), weights


def _bloom(module: Any, x: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
    q, k, v = module._reshape(module.query_key_value(x))
    code = sys.modules[type(module).__module__]
    slopes = code._get_alibi_slopes(module.num_heads, x.device).flatten()
    out, weights = attend(module, q, k, v, None, slopes=slopes)
    return module.dense(out.flatten(2)) + residual, weights


def _mpt(module: Any, x: Tensor, position_bias: Tensor, **_: Any) -> tuple[Tensor, None]:
    qkv = module.Wqkv(x)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    q, k, v = qkv.unflatten(-1, (3, module.n_heads, -1)).permute(2, 0, 3, 1, 4)
    slopes = -position_bias[:, 0, -2]  # of the last token but one
    out, weights = attend(module, q, k, v, None, scaling=module.softmax_scale, slopes=slopes)
    return module.out_proj(out.flatten(2)), weights


def _xglm(module: Any, x: Tensor, **_: Any) -> tuple[Tensor, None]:
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (p(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in projections)
    out, weights = attend(module, q, k, v, None, scaling=module.scaling)
    return module.out_proj(out.flatten(2)), weights


# By the class: which of its methods, and what takes its place.
_METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "GPTNeoSelfAttention": ("_attn", _gpt_neo),
    "GPTNeoXJapaneseAttention": ("_attn", _gpt_neox_japanese),
    "Attention": ("_attn", _openai_gpt),
    "BloomAttention": ("forward", _bloom),
    "FalconAttention": ("forward", _falcon),
    "MptAttention": ("forward", _mpt),
    "XGLMAttention": ("forward", _xglm),
}
