"""The shape of a model, read from a checkpoint's config.json; what the decoder lacks is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import CheckpointError, read_json


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; the last four apply to kind "llama3" only, `factor` also to "linear"."""

    kind: str  # "default", "linear" or "llama3"
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """One dense decoder: Qwen3, Qwen2, Llama and Mistral differ in these values only."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_position: int
    rope: RopeConfig
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]  # sliding window of each layer
    dtype: str

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "DecoderConfig":
        """Raises CheckpointError naming what is not supported."""
        hf = read_json(directory, "config.json")
        if not hf:
            raise CheckpointError(f"{directory} has no config.json; is it a checkpoint directory?")
        architecture = (hf.get("architectures") or ["(none)"])[0]
        if architecture not in _FAMILIES:
            raise CheckpointError(
                f"architecture {architecture} is not supported; supported: {', '.join(_FAMILIES)}"
            )
        _refuse_unsupported(hf)
        attention_bias = bool(hf.get("attention_bias", False))
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        try:
            return cls(
                vocab_size=hf["vocab_size"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                num_layers=hf["num_hidden_layers"],
                num_heads=hf["num_attention_heads"],
                num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
                head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
                rms_eps=hf.get("rms_norm_eps", 1e-6),
                max_position=hf["max_position_embeddings"],
                rope=_rope(hf),
                qk_norm=architecture == "Qwen3ForCausalLM",
                qkv_bias=is_qwen2 or attention_bias,
                output_bias=attention_bias and not is_qwen2,
                tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
                windows=_windows(hf, architecture),
                dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
            )
        except KeyError as error:
            raise CheckpointError(f"{directory}/config.json lacks {error}") from error

    def check_divisible(self, num_ranks: int) -> None:
        """Raises ValueError for a model that cannot be split over so many ranks."""
        kv_heads = self.num_kv_heads
        for name, value in (
            ("attention heads", self.num_heads),
            ("intermediate features", self.intermediate_size),
            (
                "key/value heads",
                max(kv_heads, num_ranks) if num_ranks % kv_heads == 0 else kv_heads,
            ),
        ):
            if value % num_ranks != 0:
                raise ValueError(
                    f"the model's {value} {name} cannot be split over {num_ranks} ranks"
                )


_FAMILIES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")

# Values of config.json under which the decoder computes what transformers does.
_ONLY = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    for name, supported in _ONLY.items():
        if hf.get(name, supported[0]) not in supported:
            raise CheckpointError(
                f"config.json: {name}={hf[name]!r} is not supported, only {supported[0]!r}"
            )


def _rope(hf: dict[str, Any]) -> RopeConfig:
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


def _windows(hf: dict[str, Any], architecture: str) -> tuple[int | None, ...]:
    """Qwen slides from layer `max_window_layers` on if `use_sliding_window`; Mistral everywhere."""
    num_layers, window = hf["num_hidden_layers"], hf.get("sliding_window")
    is_mistral = architecture == "MistralForCausalLM"
    if not is_mistral and not hf.get("use_sliding_window", False):
        window = None
    if window is None:
        return (None,) * num_layers
    first = 0 if is_mistral else hf.get("max_window_layers", 28)
    sliding = [i >= first for i in range(num_layers)]
    if hf.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in hf["layer_types"]]
    return tuple(window if slides else None for slides in sliding)
