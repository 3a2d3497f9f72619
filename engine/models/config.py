"""The shape of a model of our own blocks, and what families share in reading it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from engine.checkpoint import CheckpointError
from engine.models.blocks.attention import AttentionConfig
from engine.models.blocks.layer import LayerConfig, MlpConfig
from engine.models.blocks.mlp import GatedMlpConfig
from engine.models.blocks.rotary import RopeConfig
from engine.models.hf_config import is_classifier, longest_text
from engine.models.shape import LayerCache, ModelShape


class NotOfOurBlocksError(CheckpointError):
    """The configuration asks for what our blocks do not compute."""


@dataclass(frozen=True)
class ModelConfig(ModelShape):
    hidden_size: int
    rms_eps: float
    tied_embeddings: bool
    layers: tuple[LayerConfig, ...]

    def caches(self, num_ranks: int) -> list[LayerCache]:
        return [layer.attention.cache(num_ranks) for layer in self.layers]

    def check_divisible(self, num_ranks: int) -> None:
        for layer in self.layers:
            layer.check_divisible(num_ranks)


def dense_config(
    hf: PreTrainedConfig,
    *,
    mlp: MlpConfig | None = None,
    windows: Sequence[int | None] = (),
    qk_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
) -> ModelConfig:
    """A dense decoder as most families write it down.

    Args:
        mlp: of every layer, where it is not the gated MLP with SiLU.
        windows: sliding window of each layer; none slides by default.
    Raises:
        NotOfOurBlocksError: it is something else.
    """
    if mlp is None:
        if hf.hidden_act not in ("silu", "swish") or getattr(hf, "mlp_bias", False):
            raise NotOfOurBlocksError(f"hidden_act={hf.hidden_act!r}, or biases in the MLP")
        mlp = GatedMlpConfig(hf.intermediate_size)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    rope = RopeConfig.of(hf, head_dim)
    if 2 * len(rope.frequencies) != head_dim or head_dim % 2:
        raise NotOfOurBlocksError(f"{len(rope.frequencies)} frequencies for {head_dim} dimensions")
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads ({hf.num_attention_heads}) is no multiple of "
            f"num_key_value_heads ({hf.num_key_value_heads})"
        )
    attention = [
        AttentionConfig(
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            rope=rope,
            window=window,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
        )
        for window in windows or [None] * hf.num_hidden_layers
    ]
    return ModelConfig(
        description=f"{hf.model_type}, computed by our own blocks",
        vocab_size=hf.vocab_size,
        max_position=longest_text(hf),
        dtype=str(hf.dtype).removeprefix("torch."),
        num_labels=hf.num_labels if is_classifier(hf) else None,
        hidden_size=hf.hidden_size,
        rms_eps=hf.rms_norm_eps,
        tied_embeddings=hf.tie_word_embeddings,
        layers=tuple(LayerConfig(own, mlp) for own in attention),
    )


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
