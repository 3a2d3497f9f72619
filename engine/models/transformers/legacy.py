"""Old modules of transformers that attend by a method of their own: it goes through the interface.

Keys and values are what they would have attended to; their masks say causal or a window.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from engine.models.transformers.interface import NAME, attend


def go_through_interface(model: PreTrainedModel) -> None:
    """Let those of the model's modules that are known here be answered as all others are."""
    for module in model.modules():
        if (method := _METHODS.get(type(module).__name__)) is not None:
            module._attn = partial(method, module)
            model.config._attn_implementation = NAME  # transformers says they cannot


def _gpt_neo(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, None]:
    window = module.config.window_size if module.attention_type == "local" else None
    out, _none = attend(module, q, k, v, None, scaling=1.0, sliding_window=window)
    return out.transpose(1, 2), None


def _gpt_neox_japanese(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, None]:
    out, _none = attend(module, q, k, v, None)
    return out.transpose(1, 2), None


def _openai_gpt(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[Tensor]:
    out, _none = attend(module, q, k.mT, v, None, scaling=None if module.scale else 1.0)
    return [out.transpose(1, 2)]


_METHODS: dict[str, Callable[..., Any]] = {
    "GPTNeoSelfAttention": _gpt_neo,
    "GPTNeoXJapaneseAttention": _gpt_neox_japanese,
    "Attention": _openai_gpt,
}
