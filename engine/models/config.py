"""The shape of a model of our own blocks, and what families share in reading it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

from transformers import PreTrainedConfig

from engine.checkpoint.files import CheckpointError
from engine.models.blocks.attention import AttentionConfig, AttentionOptions
from engine.models.blocks.layer import NORMS_BEFORE, LayerConfig, LayerNorms, MlpConfig
from engine.models.blocks.mlp import GatedMlpConfig
from engine.models.blocks.rotary import RopeConfig
from engine.models.hf_config import is_classifier, longest_text
from engine.models.rewrite import UNCHANGED, Rewrites, rotary_order
from engine.models.shape import LayerCache, ModelShape


class NotOfOurBlocksError(CheckpointError):
    """The configuration asks for what our blocks do not compute."""


@dataclass(frozen=True)
class ModelConfig(ModelShape):
    hidden_size: int
    rms_eps: float
    tied_embeddings: bool
    layers: tuple[LayerConfig, ...]
    rewrites: Rewrites = UNCHANGED
    logit_scale: float = 1.0  # what the head gives is multiplied by it
    logit_softcap: float | None = None  # c: logits are then c * tanh(logits / c)

    def caches(self, num_ranks: int) -> list[LayerCache]:
        return [layer.attention.cache(num_ranks) for layer in self.layers]

    def check_divisible(self, num_ranks: int) -> None:
        for layer in self.layers:
            layer.check_divisible(num_ranks)


# What transformers calls the activations that our gated MLP has.
_ACTIVATIONS: dict[str, Literal["silu", "gelu"]] = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "gelu"),
}


def dense_config(
    hf: PreTrainedConfig,
    *,
    mlp: MlpConfig | None = None,
    windows: Sequence[int | None] = (),
    ropes: Sequence[RopeConfig] = (),
    interleaved: bool = False,
    norms: LayerNorms = NORMS_BEFORE,
    rewrites: Rewrites = UNCHANGED,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **attention: Unpack[AttentionOptions],
) -> ModelConfig:
    """A dense decoder as most families write it down.

    Args:
        mlp: of every layer; by default the gated one.
        windows: sliding window of each layer; none slides by default.
        ropes: rotary embedding of each layer; by default that of the config.
        interleaved: the checkpoint has rotary pairs side by side, not half a head apart.
        attention: of every layer.
    Raises:
        NotOfOurBlocksError: it is something else.
    """
    count, head_dim = hf.num_hidden_layers, head_dim_of(hf)
    _check_heads(hf)
    ropes = ropes or [RopeConfig.of(hf, head_dim)] * count
    windows = windows or [None] * count
    if any(2 * len(rope.frequencies) != head_dim for rope in ropes):
        raise NotOfOurBlocksError(f"{len(ropes[0].frequencies)} frequencies for {head_dim}")
    rotary_dim = max(rope.rotary_dim for rope in ropes)
    if interleaved or rotary_dim not in (0, head_dim):
        rewrites = rewrites.ordered(rotary_order(head_dim, rotary_dim, interleaved))
    layers = [
        LayerConfig(
            AttentionConfig(
                hf.num_attention_heads, hf.num_key_value_heads, head_dim, rope, window, **attention
            ),
            mlp or gated_mlp(hf),
            norms,
        )
        for rope, window in zip(ropes, windows, strict=True)
    ]
    return ModelConfig(
        description=f"{hf.model_type}, computed by our own blocks",
        vocab_size=hf.vocab_size,
        max_position=longest_text(hf),
        dtype=str(hf.dtype).removeprefix("torch."),
        num_labels=hf.num_labels if is_classifier(hf) else None,
        hidden_size=hf.hidden_size,
        rms_eps=getattr(hf, "rms_norm_eps", None) or hf.layer_norm_eps,
        tied_embeddings=hf.tie_word_embeddings,
        layers=tuple(layers),
        rewrites=rewrites,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    )


def _check_heads(hf: PreTrainedConfig) -> None:
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads ({hf.num_attention_heads}) is no multiple of "
            f"num_key_value_heads ({hf.num_key_value_heads})"
        )


def gated_mlp(hf: PreTrainedConfig) -> GatedMlpConfig:
    name = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if name not in _ACTIVATIONS:
        raise NotOfOurBlocksError(f"hidden_act={name!r}")
    return GatedMlpConfig(
        hf.intermediate_size, _ACTIVATIONS[name], bias=getattr(hf, "mlp_bias", False)
    )


def head_dim_of(hf: PreTrainedConfig) -> int:
    given: int | None = getattr(hf, "head_dim", None)
    return given or hf.hidden_size // hf.num_attention_heads


def sliding_windows(hf: PreTrainedConfig, kinds: Sequence[str]) -> list[int | None]:
    """The window of each layer, of these kinds."""
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise NotOfOurBlocksError(f"layer_types {sorted(unknown)}")
    if hf.sliding_window is not None and hf.sliding_window < 1:
        raise CheckpointError(
            f"config.json: sliding_window={hf.sliding_window}: a token sees itself, so at least 1; "
            "null is no window"
        )
    return [hf.sliding_window if kind == "sliding_attention" else None for kind in kinds]
