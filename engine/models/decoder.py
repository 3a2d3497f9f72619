"""A decoder-only transformer over a paged KV cache: token ids to hidden states to logits."""

from torch import Tensor, nn

from engine.models.blocks.embedding import VocabEmbedding
from engine.models.blocks.linear import BuildContext
from engine.models.blocks.norm import Norm
from engine.models.blocks.rotary import rotary_table
from engine.models.config import ModelConfig
from kernels import Ops
from kernels.quantization import Quantization
from kernels.types import KVCache, StepInputs


class Decoder(nn.Module):
    """Attributes are called as checkpoints call their tensors."""

    def __init__(self, config: ModelConfig, max_model_len: int, context: BuildContext) -> None:
        super().__init__()
        self._ops = context.ops
        self._eps = context.rms_eps
        self.embed_tokens = VocabEmbedding(context, config.vocab_size)
        self.layers = nn.ModuleList(layer.build(context) for layer in config.layers)
        self.norm = Norm(config.hidden_size)
        # Layers with the same rotary embedding share its table.
        ropes = [layer.attention.rope for layer in config.layers]
        tables = {rope: f"cos_sin_{i}" for i, rope in enumerate(dict.fromkeys(ropes))}
        for rope, name in tables.items():
            table = rotary_table(rope, max_model_len)
            self.register_buffer(name, table, persistent=False)
        self._tables = [tables[rope] for rope in ropes]
        self._groups = {i: g for g, layers in enumerate(config.cache_groups(1)) for i in layers}

    def forward(self, step: StepInputs, kv_caches: list[KVCache]) -> Tensor:
        """Hidden states [T, hidden], normed; writes the step's keys and values."""
        x = self.embed_tokens.embed(step.token_ids)
        residual: Tensor | None = None
        for i, (layer, cache) in enumerate(zip(self.layers, kv_caches, strict=True)):
            cos_sin, inputs = self.get_buffer(self._tables[i]), step.attention[self._groups[i]]
            x, residual = layer(x, residual, step.positions, cos_sin, cache, inputs)
        assert residual is not None  # there is a layer
        return self._ops.add_rms_norm(x, residual, self.norm.weight, self._eps)[0]


class CausalLM(nn.Module):
    """A decoder and its head. Parameters are uninitialized until loaded."""

    is_recordable = is_all_ops = True

    def __init__(self, config: ModelConfig, max_model_len: int, context: BuildContext) -> None:
        super().__init__()
        self.model = Decoder(config, max_model_len, context)
        self._scale, self._softcap = config.logit_scale, config.logit_softcap
        self.is_classifier = config.num_labels is not None
        if config.num_labels is not None:
            self.score = self.lm_head = VocabEmbedding(context, config.num_labels)
        elif config.tied_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = VocabEmbedding(context, config.vocab_size)

    @property
    def is_tied(self) -> bool:
        return self.lm_head is self.model.embed_tokens

    def pack_head(self, ops: Ops, quantization: Quantization | None) -> None:
        """Once it is loaded; in 8 bits where layers have 4, for few logits decide each token."""
        packed: Quantization | None = "w8a8" if quantization and not self.is_classifier else None
        self.lm_head.pack_head(ops, packed, self.is_tied)

    def forward(self, step: StepInputs, kv_caches: list[KVCache]) -> Tensor:
        """Hidden states [T, hidden], normed; writes the step's keys and values."""
        hidden: Tensor = self.model(step, kv_caches)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab], or [N, labels] of a classifier, in the model's dtype."""
        logits = self.lm_head.logits(hidden)
        if self.is_classifier:
            return logits
        if self._scale != 1:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = (logits / self._softcap).tanh() * self._softcap
        return logits
