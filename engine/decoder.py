"""A dense decoder-only transformer over a paged KV cache."""

import math

import torch
from torch import Tensor, nn

from engine.decoder_config import DecoderConfig, RopeConfig
from engine.layers import ColumnLinear, Norm, RowLinear, VocabEmbedding
from engine.parallel import TensorParallel
from kernels import Ops
from kernels.quantization import Quantization
from kernels.types import KVCache, StepInputs


class Attention(nn.Module):
    """Grouped-query attention, with normed queries and keys in the models that have it."""

    def __init__(
        self, config: DecoderConfig, index: int, prefix: str, ops: Ops, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self._ops = ops
        self._eps = config.rms_eps
        self._head_dim = config.head_dim
        self._window = config.windows[index]
        head_dim = config.head_dim
        kv_size = config.num_kv_heads * head_dim
        kv_shards = min(parallel.size, config.num_kv_heads)
        self.qkv_proj = ColumnLinear(
            [
                (f"{prefix}.q_proj", config.num_heads * head_dim, None),
                (f"{prefix}.k_proj", kv_size, kv_shards),
                (f"{prefix}.v_proj", kv_size, kv_shards),
            ],
            config.hidden_size,
            config.qkv_bias,
            parallel,
        )
        self.o_proj = RowLinear(
            f"{prefix}.o_proj",
            config.num_heads * head_dim,
            config.hidden_size,
            config.output_bias,
            parallel,
        )
        self.q_norm = Norm(f"{prefix}.q_norm", head_dim) if config.qk_norm else None
        self.k_norm = Norm(f"{prefix}.k_norm", head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, step: StepInputs, cache: KVCache, cos_sin: Tensor) -> Tensor:
        (inputs,) = step.attention
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight
        q = self._ops.norm_rotary_store(
            self.qkv_proj(x), norms, self._eps, step.positions, cos_sin, cache, inputs.slots
        )
        attended = self._ops.attention.attend(
            q, cache, inputs, scale=self._head_dim**-0.5, window=self._window
        )
        return self.o_proj(attended.flatten(1))


class FeedForward(nn.Module):
    """The gated MLP: down(SiLU(gate(x)) * up(x))."""

    def __init__(
        self, config: DecoderConfig, prefix: str, ops: Ops, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self._ops = ops
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = ColumnLinear(
            [(f"{prefix}.gate_proj", inner, None), (f"{prefix}.up_proj", inner, None)],
            hidden,
            False,
            parallel,
        )
        self.down_proj = RowLinear(f"{prefix}.down_proj", inner, hidden, False, parallel)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._ops.silu_and_mul(self.gate_up_proj(x)))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm; the residual runs beside them unnormed."""

    def __init__(
        self, config: DecoderConfig, index: int, ops: Ops, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self._ops = ops
        self._eps = config.rms_eps
        prefix = f"model.layers.{index}"
        self.input_norm = Norm(f"{prefix}.input_layernorm", config.hidden_size)
        self.attention = Attention(config, index, f"{prefix}.self_attn", ops, parallel)
        self.post_norm = Norm(f"{prefix}.post_attention_layernorm", config.hidden_size)
        self.mlp = FeedForward(config, f"{prefix}.mlp", ops, parallel)

    def forward(
        self, x: Tensor, residual: Tensor | None, step: StepInputs, cache: KVCache, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x is what the layer before adds to the residual; the first layer has none yet."""
        if residual is None:
            x, residual = self._ops.rms_norm(x, self.input_norm.weight, self._eps), x
        else:
            x, residual = self._ops.add_rms_norm(x, residual, self.input_norm.weight, self._eps)
        x = self.attention(x, step, cache, cos_sin)
        x, residual = self._ops.add_rms_norm(x, residual, self.post_norm.weight, self._eps)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Token ids to hidden states to logits. Parameters are uninitialized until loaded."""

    def __init__(
        self,
        config: DecoderConfig,
        max_model_len: int,
        ops: Ops,
        parallel: TensorParallel,
    ) -> None:
        super().__init__()
        self._ops = ops
        self._eps = config.rms_eps
        self.embedding = VocabEmbedding(
            "model.embed_tokens", config.vocab_size, config.hidden_size, parallel
        )
        self.layers = nn.ModuleList(
            Layer(config, i, ops, parallel) for i in range(config.num_layers)
        )
        self.norm = Norm("model.norm", config.hidden_size)
        self.lm_head = (
            self.embedding
            if config.tied_embeddings
            else VocabEmbedding("lm_head", config.vocab_size, config.hidden_size, parallel)
        )
        self.cos_sin: Tensor
        self.register_buffer(
            "cos_sin", rotary_table(config.rope, config.head_dim, max_model_len), persistent=False
        )

    def pack_linear(self, module: nn.Module, quantization: Quantization | None) -> None:
        """Once its parameters are loaded: bring a linear layer into the device's layout."""
        if isinstance(module, (ColumnLinear, RowLinear)):
            module.pack(self._ops, quantization)

    def pack_head(self, quantization: Quantization | None) -> None:
        """As `pack_linear`; in 8 bits where the layers have 4, for few logits decide each token."""
        self.lm_head.pack_head(
            self._ops,
            "w8a8" if quantization else None,
            tied=self.lm_head is self.embedding,
        )

    def forward(self, step: StepInputs, kv_caches: list[KVCache]) -> Tensor:
        """Hidden states [T, hidden], normed; writes the step's keys and values."""
        x = self.embedding.embed(self._ops, step.token_ids)
        residual: Tensor | None = None
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, step, cache, self.cos_sin)
        assert residual is not None  # there is a layer
        return self._ops.add_rms_norm(x, residual, self.norm.weight, self._eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab], in the model's dtype."""
        return self.lm_head.logits(hidden)


def rotary_table(rope: RopeConfig, head_dim: int, max_position: int) -> Tensor:
    """[max_position, head_dim] float32: cosines, then sines, of position times frequency."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _llama3_frequencies(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1's: long wavelengths are stretched by `factor`, short ones kept, blended between."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequencies * (blend + (1 - blend) / rope.factor)
