"""The shape of a model, layer by layer, and what families share in reading it from config.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.checkpoint import CheckpointError
from engine.models.blocks.attention import AttentionConfig
from engine.models.blocks.layer import LayerConfig, MlpConfig
from engine.models.blocks.mlp import GatedMlpConfig
from engine.models.blocks.rotary import RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    rms_eps: float
    max_position: int
    tied_embeddings: bool
    dtype: str
    layers: tuple[LayerConfig, ...]

    def check_divisible(self, num_ranks: int) -> None:
        """Raises ValueError for a model that cannot be split over so many ranks."""
        for layer in self.layers:
            layer.check_divisible(num_ranks)

    def cache_groups(self) -> list[list[int]]:
        """Layers that cache alike, which share block tables; those that keep all tokens first."""
        groups: dict[tuple[int, int, int | None], list[int]] = {}
        for i, layer in enumerate(self.layers):
            own = layer.attention
            groups.setdefault((own.num_kv_heads, own.head_dim, own.window), []).append(i)
        return [groups[key] for key in sorted(groups, key=lambda key: key[2] is not None)]


def dense_config(
    hf: dict[str, Any],
    *,
    mlp: MlpConfig | None = None,
    windows: Sequence[int | None] = (),
    qk_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
) -> ModelConfig:
    """A dense decoder as most families write it down.

    Args:
        hf: config.json.
        mlp: of every layer, where it is not the gated MLP with SiLU.
        windows: sliding window of each layer; none slides by default.
    Raises:
        CheckpointError: config.json asks for what these blocks do not compute.
        KeyError: config.json lacks a field.
    """
    refuse_unsupported(hf, _ONLY)
    if mlp is None:
        refuse_unsupported(hf, _ONLY_OF_GATED_MLP)
        mlp = GatedMlpConfig(hf["intermediate_size"])
    num_layers, num_heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    rope = rope_config(hf)
    attention = [
        AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
            rope=rope,
            window=window,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
        )
        for window in windows or [None] * num_layers
    ]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        rms_eps=hf.get("rms_norm_eps", 1e-6),
        max_position=hf["max_position_embeddings"],
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
        layers=tuple(LayerConfig(own, mlp) for own in attention),
    )


# Values of config.json under which these blocks compute what transformers does.
_ONLY: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1, 1.0, None)}
_ONLY_OF_GATED_MLP: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
}


def refuse_unsupported(hf: dict[str, Any], only: dict[str, tuple[Any, ...]]) -> None:
    for name, supported in only.items():
        if hf.get(name, supported[0]) not in supported:
            raise CheckpointError(
                f"config.json: {name}={hf[name]!r} is not supported, only {supported[0]!r}"
            )


def rope_config(hf: dict[str, Any]) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return RopeConfig(kind, theta)
    if kind == "linear":
        return RopeConfig(kind, theta, float(rope["factor"]))
    if kind == "llama3":
        return RopeConfig(
            kind,
            theta,
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise CheckpointError(
        f"config.json: rope_type {kind!r} is not supported; supported: default, linear, llama3"
    )


def sliding_windows(hf: dict[str, Any], first: int = 0) -> list[int | None]:
    """The window of each layer: of those from `first` on, or where layer_types says so."""
    num_layers, window = hf["num_hidden_layers"], hf.get("sliding_window")
    slides = [i >= first for i in range(num_layers)]
    if hf.get("layer_types"):
        slides = [kind == "sliding_attention" for kind in hf["layer_types"]]
    return [window if slides_here else None for slides_here in slides]
