"""What the ops of all devices take and give.

Shapes use T = tokens in the step (all requests end to end), B = requests in the step, G = groups of
layers that share block tables, M = blocks of a table's row, H = query heads, K = key/value heads,
D = head dimension, V = vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels.quantization import Quantization

Linear = Callable[[Tensor], Tensor]  # [T, in] -> [T, out]


class Rounded(NamedTuple):
    """Rows in 8 bits, for linear maps that would round them themselves."""

    values: Tensor  # [T, N] float8_e4m3fn
    scales: Tensor  # [T, 1] float32, to multiply a row's values with
    dtype: torch.dtype  # that they stand for

    @classmethod
    def empty_like(cls, x: Tensor) -> "Rounded":
        """Of x [T, N]; contents are undefined."""
        values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        return cls(values, x.new_empty(x.shape[0], 1, dtype=torch.float32), x.dtype)


class SamplingTable(NamedTuple):
    """How each of R rows draws its tokens, [R] each."""

    temperature: Tensor  # float32; 0 = greedy, the rest is then ignored
    top_k: Tensor  # int64; 0 = off
    top_p: Tensor  # float32; 1 = off
    min_p: Tensor  # float32; 0 = off
    seeds: Tensor  # int64


@runtime_checkable
class Table(Protocol):
    """A linear map that has its weight as it was given, so that it may be an embedding too."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [T, in] of the weight [out, in]; ids [T] int64."""


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of a GPU, of attention above all."""

    backend: Literal["auto", "triton", "flash-attn-2", "flash-attn-4"]
    dtype: torch.dtype
    cache_dtype: torch.dtype
    head_dim: int
    block_size: int
    deterministic: bool = False  # each token by the same operations, whoever shares its step
    quantization: Quantization | None = None


@dataclass(frozen=True)
class PagedKV:
    """What a layer keeps of its tokens: keys and values, in blocks."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        elements = self.num_kv_heads * self.block_size * self.head_dim
        return 2 * elements * self.dtype.itemsize


@dataclass(frozen=True)
class KVCache:
    """One layer's keys and values, in the layout of the attention that made it.

    Others know only that `tensors` are all of it, and that each has its blocks as dimension 0.
    """

    spec: PagedKV
    keys: Tensor  # [num_blocks, K, block_size, D]
    values: Tensor  # [num_blocks, K, block_size, D]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values


class Decodes(NamedTuple):
    """The first requests of a step, which have few tokens each: one, or with it some drafts."""

    rows: int
    tokens: int
    longest: int = 1  # most tokens of any

    @classmethod
    def of(cls, lengths: Sequence[int], most: int = 1) -> "Decodes":
        """Of requests with so many tokens, the first ones that have `most` at most."""
        rows = next((i for i, n in enumerate(lengths) if not 1 <= n <= most), len(lengths))
        return cls(rows, sum(lengths[:rows]), max(lengths[:rows], default=1))


NO_DECODES = Decodes(0, 0)


@dataclass(frozen=True)
class StepRows:
    """Which tokens a step computes: of request i, those from starts[i] on of table row rows[i]."""

    rows: Tensor  # [B] int32; a row of -1 only pads the batch
    starts: Tensor  # [B] int32
    query_starts: Tensor  # [B + 1] int32, from 0 to num_tokens: how many tokens each request has
    num_tokens: int
    decodes: Decodes
    max_query_len: int  # most tokens of any request


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention of a group of layers reads of a step.

    Request i owns queries query_starts[i] .. query_starts[i + 1] - 1; they are the last ones of its
    context_lens[i] tokens.
    """

    query_starts: Tensor  # [B + 1] int32, from 0 to T
    context_lens: Tensor  # [B] int32; 0 for what only pads the batch
    block_tables: Tensor  # [B, M] int32; entries past a request's last block are never read
    slots: Tensor  # [T] int64, block * block_size + offset of each token; -1 is nowhere
    decodes: Decodes
    max_query_len: int  # most queries of any request
    plan: Any = None  # what the attention that made it lets the layers share


@dataclass(frozen=True)
class StepInputs:
    """What a model reads of a step: T tokens of B requests, end to end."""

    rows: StepRows
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    attention: tuple[AttentionInputs, ...]  # G

    @classmethod
    def of(
        cls,
        step: StepRows,
        token_ids: Tensor,
        positions: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        slots: Tensor,
    ) -> "StepInputs":
        """From the block_tables [G, B, M] and slots [G, T] of all groups."""
        groups = (
            AttentionInputs(
                step.query_starts,
                context_lens,
                block_tables[group],
                slots[group],
                step.decodes,
                step.max_query_len,
            )
            for group in range(len(slots))
        )
        return cls(step, token_ids, positions, tuple(groups))
