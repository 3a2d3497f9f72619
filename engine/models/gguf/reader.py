"""Tensors of GGUF files, dequantized as they are read, by the names that transformers has."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from gguf.quants import dequantize
from torch import Tensor

from engine.checkpoint.files import CheckpointError
from engine.models.blocks.linear import Source
from engine.models.gguf.convert import ROPE_FACTORS
from engine.models.gguf.file import GgufFile, StoredTensor
from engine.models.gguf.levels import grouped_weight
from kernels.grouped import StoredWeight

_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_GEMMA_LAYER = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


_PLAIN = ("F64", "F32", "F16", "BF16")
_VALUES = 1 << 21  # dequantized at once


class GgufReader:
    """Implements `TensorReader`."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = files = [GgufFile(path) for path in paths]
        metadata = files[0].metadata
        architecture: str = metadata["general.architecture"]
        self._is_gemma = architecture.startswith("gemma")
        self._in_layer = _IN_LAYER | (_IN_GEMMA_LAYER if self._is_gemma else {})
        self._tensors: dict[str, StoredTensor] = {
            self._our_name(name): tensor
            for file in files
            for name, tensor in file.tensors.items()
            if name != ROPE_FACTORS  # they are in config.json
        }
        self.num_values = sum(math.prod(tensor.shape) for tensor in self._tensors.values())
        self.narrow = {n for n, t in self._tensors.items() if t.kind.name not in _PLAIN}
        # Its converter reorders the rows of these, for rotary pairs that lie side by side.
        self._heads: dict[str, int] = {}
        if architecture == "llama":
            heads = metadata["llama.attention.head_count"]
            kv_heads = metadata.get("llama.attention.head_count_kv", heads)
            self._heads = {"q_proj": heads, "k_proj": kv_heads}

    def _our_name(self, name: str) -> str:
        """What is unknown stays as it is, and is found to be left over."""
        stem, _, kind = name.rpartition(".")
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
            return f"model.layers.{match[1]}.{self._in_layer.get(match[2], match[2])}.{kind}"
        return f"{_OUTSIDE.get(stem, stem)}.{kind}"

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def check(self, source: Source) -> None:
        if source.name not in self._tensors:
            raise CheckpointError(f"the GGUF file has no tensor for {source.name!r}")
        shape = self._tensors[source.name].shape
        if shape != source.shape:
            raise CheckpointError(
                f"the GGUF file's {source.name} has shape {shape}, its metadata say {source.shape}"
            )

    def read(self, source: Source) -> Tensor:
        self.check(source)
        values = self.values(source.name)
        return values.narrow(source.dim, source.start, source.end - source.start)

    def _tensor(self, name: str) -> StoredTensor:
        for file in self._files:
            file.let_go()
        return self._tensors[name]

    def stored(self, source: Source) -> StoredWeight | None:
        whole = grouped_weight(self._tensor(source.name))
        if whole is None:
            return None
        heads = self._heads.get(source.name.split(".")[-2])
        if heads is not None:
            order = torch.arange(whole.shape[0])
            whole = whole.ordered(_by_halves(order, heads))
        return whole.narrow(source.dim, source.start, source.end)

    def values(self, name: str) -> Tensor:
        """The whole tensor in float32."""
        values = _dequantized(self._tensor(name))
        if self._is_gemma and name.endswith("norm.weight"):
            return values - 1  # transformers adds it
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return values
        return _by_halves(values, heads)

    def equal(self, name: str, other: str) -> bool:
        return torch.equal(self.values(name), self.values(other))

    def __enter__(self) -> "GgufReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._tensors.clear()


def _by_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of heads as transformers has them; of each rotary pair both lie side by side here."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _dequantized(stored: StoredTensor) -> Tensor:
    """Some rows at a time, as one row: the library itself takes sixteen in each turn of a loop."""
    values = torch.empty(stored.shape, dtype=torch.float32)
    rows = stored.rows.reshape(-1, stored.rows.shape[-1])
    into = values.view(len(rows), -1)
    step = max(_VALUES // into.shape[1], 1)
    for start in range(0, len(rows), step):
        part = dequantize(rows[start : start + step].reshape(1, -1), stored.kind)
        into[start : start + step] = torch.from_numpy(part).view(-1, into.shape[1])
    return values
