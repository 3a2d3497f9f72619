"""The op interface: the functions a model is made of, as one table per device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kernels import reference
from kernels.grouped import StoredWeight
from kernels.quantization import Quantization
from kernels.types import (
    AttentionInputs,
    KVCache,
    Linear,
    PagedKV,
    Rounded,
    SamplingTable,
    StepInputs,
    StepRows,
)


class Attention(Protocol):
    """Causal attention over a paged cache, whose layout is its own."""

    def new_cache(self, num_blocks: int, spec: PagedKV, device: torch.device) -> KVCache:
        """One layer's cache. Contents are undefined."""

    def store(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Write k, v [T, K, D] at slots [T] int64: block * block_size + offset; -1 is nowhere.

        A cache of float8_e4m3fn takes values up to +-448, and what lies beyond as that.
        """

    def plan(self, inputs: AttentionInputs, spec: PagedKV) -> AttentionInputs:
        """The same inputs, with what the layers of this spec can share in a step."""

    def attend(
        self,
        q: Tensor,
        cache: KVCache,
        inputs: AttentionInputs,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of variable-length queries over the tokens before and at them.

        All keys and values, those of the queries' own tokens included, are already in the cache.

        Args:
            q: [T, H, D], H a multiple of K.
            inputs: as `plan` made them.
            window: a query sees itself and the window - 1 tokens before it, and blocks that lie
                wholly before are never read; None sees all.
            softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2; None leaves them.
            sinks: [H], the score of what each head may attend to in place of any token, as in
                gpt-oss; of q's dtype. On a GPU plain torch attends with them.
        Returns:
            [T, H, D], q's dtype; zeros for what only pads the batch.
        """


class Sampling(Protocol):
    """From logits to tokens; see `kernels.reference`."""

    def sample(
        self,
        logits: Tensor,
        table: SamplingTable,
        rows: Tensor,
        positions: Tensor,
    ) -> Tensor: ...

    def penalize(
        self,
        logits: Tensor,
        token_ids: Tensor,
        num_tokens: Tensor,
        counts: Tensor,
        repetition: Tensor,
        presence: Tensor,
        frequency: Tensor,
    ) -> None: ...

    def apply_bitmask(self, logits: Tensor, bitmask: Tensor) -> None: ...

    def top_logprobs(
        self, logits: Tensor, token_ids: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Recorder(Protocol):
    """Turns work of this device into something to run again without its many launches.

    The work must do the same for every content of the tensors it reads, and wait for nothing.
    """

    # Whether to record before there are requests, for it takes time and memory.
    ahead: bool

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
        """Run the work; returns its result, and what computes that anew in the same place.

        The latter is None if some of the work cannot be recorded. All recordings of one recorder
        share their memory, so a result is to be used before another is run.
        """


class CompilationWatch(Protocol):
    """Knows which kernels were compiled only after `start_serving`: they held up requests."""

    late: list[str]

    def start_serving(self) -> None:
        """Warm-up is over."""


@dataclass(frozen=True)
class Rounding:
    """What comes before a linear map that takes rounded inputs (it says so by `takes_rounded`).

    As those of `Ops`, with the rounding in the same kernel; where that cannot be, without.
    """

    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Rounded, Tensor]]
    silu_and_mul: Callable[[Tensor], Rounded | Tensor]
    gelu_and_mul: Callable[[Tensor], Rounded | Tensor]


@dataclass(frozen=True)
class Ops:
    """The functions of `kernels.reference`, which documents them, for one device.

    A faster implementation replaces entries of the table with `dataclasses.replace`.
    """

    name: str
    # How products of a dtype or quantization are computed, where that differs between processors.
    products: Mapping[torch.dtype | str, str] = field(default_factory=dict)
    is_invariant: bool = False  # a token has the same bits, whatever else is in its step
    attention: Attention = reference.attention
    sampling: Sampling = reference
    new_recorder: Callable[[], Recorder] | None = None  # where launching is worth saving
    prepare_step: Callable[[StepRows, Tensor, Tensor, int], StepInputs] = reference.prepare_step
    embed: Callable[[Tensor, Tensor], Tensor] = reference.embed
    pack_linear: Callable[[Tensor, Tensor | None, Quantization | None], Linear] = (
        reference.pack_linear
    )
    # Weights [out, in] of one input, one below the other, with the bits that are stored; None, here
    # or of what is given, where no kernel multiplies those.
    pack_stored: (
        Callable[[Sequence[Tensor | StoredWeight], Tensor | None], Linear | None] | None
    ) = None
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = (
        reference.add_rms_norm
    )
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = reference.rotary
    silu_and_mul: Callable[[Tensor], Tensor] = reference.silu_and_mul
    gelu_and_mul: Callable[[Tensor], Tensor] = reference.gelu_and_mul
    rounding: Rounding | None = None
    # `norm_rotary_store` in one kernel, for caches of the attention it comes with.
    fused_norm_rotary_store: (
        Callable[
            [Tensor, tuple[Tensor, Tensor] | None, float, Tensor, Tensor, KVCache, Tensor], Tensor
        ]
        | None
    ) = None

    def norm_rotary_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
        cache: KVCache,
        slots: Tensor,
    ) -> Tensor:
        """What most models have between the qkv projection and attention, fused where it can be.

        Args:
            qkv: [T, (H + 2 * K) * D]: queries, keys, values.
            norms: weights [D] of the query norm and the key norm, in models that have them.
            positions, cos_sin: see `kernels.reference.rotary`.
            slots: see `Attention.store`.
        Returns:
            Queries [T, H, D], ready for `Attention.attend`.
        """
        if self.fused_norm_rotary_store is not None:
            return self.fused_norm_rotary_store(qkv, norms, eps, positions, cos_sin, cache, slots)
        heads = qkv.unflatten(-1, (-1, cache.spec.head_dim))
        kv_heads = cache.spec.num_kv_heads
        q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        if norms is not None:
            q, k = self.rms_norm(q, norms[0], eps), self.rms_norm(k, norms[1], eps)
        q, k = self.rotary(q, k, positions, cos_sin)
        self.attention.store(k, v, cache, slots)
        return q


REFERENCE = Ops("reference")
