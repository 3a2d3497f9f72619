"""Prompts by flash-attn (Tri Dao and others), where it is installed; decoding stays with Triton.

Its kernels make full use of the tensor cores, which is what prompts need. Decoding is bound by
memory, and there flash-attn-4 does not split contexts on Hopper, while Triton does.
The rule is measured by `benchmarks.kernels`, which runs both on both.

Both packages address the cache by strides, so its layout stays that of `reference.PagedAttention`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.cache import cache_directory
from kernels.ops import Attention
from kernels.types import NO_DECODES, AttentionInputs, AttentionNeeds, KVCache, PagedKV

# By version, the best first.
MODULES = {4: "flash_attn.cute", 2: "flash_attn"}
# Version 4 has kernels of their own for prompts that fit into one tile of queries, and would take
# seconds to compile them when the first comes.
_LONGER_THAN_A_TILE = 512


@dataclass(frozen=True)
class FlashPlan:
    """The requests of a step apart: those that decode, at its beginning, and the others."""

    decodes: AttentionInputs  # planned
    prompts: AttentionInputs
    context_starts: Tensor | None  # [P + 1] int32, cumulative contexts of P prompts, for version 2


class FlashAttention:
    """Implements `kernels.ops.Attention` by one of the two packages.

    Args:
        version: 2 for `flash_attn`, 4 for `flash_attn.cute`.
        varlen: the package's flash_attn_varlen_func.
        decoding: makes the cache, and serves the decodes.
    """

    def __init__(self, version: int, varlen: Callable[..., Any], decoding: Attention) -> None:
        self.name = f"flash-attn-{version}"
        self._version = version
        self._varlen = varlen
        self._decoding = decoding

    def new_cache(self, num_blocks: int, spec: PagedKV, device: torch.device) -> KVCache:
        return self._decoding.new_cache(num_blocks, spec, device)

    def store(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        self._decoding.store(k, v, cache, slots)

    def plan(self, inputs: AttentionInputs, spec: PagedKV) -> AttentionInputs:
        first, num_tokens, longest = inputs.decodes
        decodes = replace(
            inputs,
            query_starts=inputs.query_starts[: first + 1],
            context_lens=inputs.context_lens[:first],
            block_tables=inputs.block_tables[:first],
            slots=inputs.slots[:num_tokens],
            max_query_len=longest,
        )
        prompts = replace(  # of all queries, of which the first are nobody's
            inputs,
            query_starts=inputs.query_starts[first:],
            context_lens=inputs.context_lens[first:],
            block_tables=inputs.block_tables[first:],
            slots=inputs.slots[num_tokens:],
            decodes=NO_DECODES,
        )
        context_starts = None
        if self._version == 2:
            ends = prompts.context_lens.cumsum(0, dtype=torch.int32)
            context_starts = torch.nn.functional.pad(ends, (1, 0))
        decodes = self._decoding.plan(decodes, spec)
        return replace(inputs, plan=FlashPlan(decodes, prompts, context_starts))

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
        if sinks is not None:
            return reference.attention.attend(q, cache, inputs, scale, window, softcap, sinks)
        decodes, plan = inputs.decodes, inputs.plan
        if inputs.context_lens.shape[0] == decodes.rows:
            return self._decoding.attend(q, cache, plan.decodes, scale, window, softcap)
        out = self._attend_prompts(q, cache, plan, scale, window, softcap)
        if decodes.rows > 0:  # few beside the others, so they are copied
            own, settings = q[: decodes.tokens], (scale, window, softcap)
            out[: decodes.tokens] = self._decoding.attend(own, cache, plan.decodes, *settings)
        return out

    def _attend_prompts(
        self,
        q: Tensor,
        cache: KVCache,
        plan: FlashPlan,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """[T, H, D], in which the rows of the decodes are undefined."""
        # [blocks, K, block_size, D] -> [blocks, block_size, K, D], as views
        k, v = (part.transpose(1, 2) for part in cache.tensors)
        prompts = plan.prompts
        shared = dict(
            cu_seqlens_q=prompts.query_starts,
            max_seqlen_k=prompts.block_tables.shape[1] * cache.spec.block_size,
            softmax_scale=scale,
            causal=True,
            softcap=softcap or 0.0,
        )
        if self._version == 2:
            return self._varlen(
                q,
                k,
                v,
                max_seqlen_q=prompts.max_query_len,
                cu_seqlens_k=plan.context_starts,
                block_table=prompts.block_tables,
                window_size=(-1, -1) if window is None else (window - 1, 0),
                **shared,
            )
        attended = self._varlen(
            q,
            k,
            v,
            max_seqlen_q=max(prompts.max_query_len, _LONGER_THAN_A_TILE),
            seqused_k=prompts.context_lens,
            page_table=prompts.block_tables,
            window_size=(None, None) if window is None else (window - 1, 0),
            **shared,
        )
        return attended[0] if isinstance(attended, tuple) else attended


def find(
    needs: AttentionNeeds, capability: tuple[int, int], num_processors: int
) -> FlashAttention | str:
    """The best version that is asked for, installed and serves the needs, or why there is none."""
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in 16 bits, not {needs.dtype}"
    if needs.cache_dtype != needs.dtype:
        return f"it does not mix {needs.dtype} with a cache of {needs.cache_dtype}"
    reasons = []
    for version, module in MODULES.items():
        if needs.backend not in ("auto", f"flash-attn-{version}"):
            continue
        reason = _refuses(version, needs, capability)
        if reason is None:
            try:
                _keep_on_disk()
                varlen = import_module(module).flash_attn_varlen_func
            except (ImportError, AttributeError, RuntimeError, OSError) as error:
                reason = f"cannot be imported ({error})"
            else:
                from kernels.cuda.attention import TritonAttention

                return FlashAttention(version, varlen, TritonAttention(num_processors))
        reasons.append(f"flash-attn {version} {reason}")
    return "; ".join(reasons)


def _keep_on_disk() -> None:
    """What version 4 compiles, which it does only when told to, and not where others can write."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    directory = str(cache_directory() / "flash-attn-4")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", directory)


def _refuses(version: int, needs: AttentionNeeds, capability: tuple[int, int]) -> str | None:
    """Why a version cannot serve these needs on a GPU of this compute capability, or None."""
    major = capability[0]
    if version == 4 and major not in (9, 10, 11):
        return f"has no paged cache on compute capability {major}.{capability[1]}"
    largest = 256 if version == 2 or major == 9 else 128
    multiple = 8 if version == 2 else 16  # flash-attn 4 does not pad heads of a paged cache
    if needs.head_dim % multiple != 0 or needs.head_dim > largest:
        return f"has no kernel for heads of {needs.head_dim}"
    if version == 2 and major < 8:
        return "is for Ampere and later"
    if version == 2 and needs.block_size % 256 != 0:
        return f"needs a block_size of 256, not {needs.block_size}"
    return None
