"""What the engine knows of a model before it is loaded, whoever computes it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.ranks.rank_group import RankGroup
from kernels import Ops
from kernels.types import KVCache, StepInputs


@dataclass(frozen=True)
class LayerCache:
    """What a rank's part of a layer keeps of each token."""

    num_kv_heads: int
    head_dim: int
    window: int | None = None  # a token sees itself and the window - 1 tokens before it


@dataclass(frozen=True)
class ModelShape(ABC):
    description: str  # who computes what, for people
    vocab_size: int
    max_position: int
    dtype: str
    num_labels: int | None  # of a classifier, which has a head for them and none for words

    @property
    def state_bytes(self) -> int:
        """What a text takes beside the cache of its tokens; only its whole past is such a state."""
        return 0

    @abstractmethod
    def caches(self, num_ranks: int) -> Sequence[LayerCache]:
        """What each layer that attends keeps, in order, on one of so many ranks."""

    @abstractmethod
    def check_divisible(self, num_ranks: int) -> None:
        """Raises ValueError for a model that cannot be split over so many ranks."""

    def cache_groups(self, num_ranks: int) -> list[list[int]]:
        """Layers that cache alike, which share block tables; those that keep all tokens first."""
        groups: dict[LayerCache, list[int]] = {}
        for i, cache in enumerate(self.caches(num_ranks)):
            groups.setdefault(cache, []).append(i)
        return [groups[cache] for cache in sorted(groups, key=lambda own: own.window is not None)]


@dataclass(frozen=True)
class ModelSpec:
    """What a rank's model is made of."""

    config: EngineConfig
    shape: ModelShape
    directory: Path
    max_len: int
    dtype: torch.dtype
    device: torch.device
    ops: Ops
    parallel: RankGroup


class LanguageModel(Protocol):
    """A loaded model over a paged KV cache."""

    is_recordable: bool  # whether its decoding may be recorded and replayed
    is_all_ops: bool  # whether nothing but the device's ops computes it

    def __call__(self, step: StepInputs, kv_caches: list[KVCache]) -> Tensor:
        """Hidden states [T, hidden] of a step; writes its keys and values."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab], or [N, labels] of a classifier, in the model's dtype."""
