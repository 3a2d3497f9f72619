"""Paged attention by Triton: one kernel for rows of few tokens, which decode, one for prompts.

Both pack the query heads that share a key/value head into the rows of one tile (grouped-query
attention), and stream keys and values once with an online softmax, after FlashAttention-2 (Dao,
2023). Nothing about lengths has to come to the host, so that one CUDA graph serves all lengths.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.cuda.attention_decode import decode, plan_decodes
from kernels.cuda.attention_prompt import prompts
from kernels.cuda.rotary import store
from kernels.reference import PagedAttention
from kernels.types import NO_DECODES, AttentionInputs, KVCache, PagedKV

# Decoding programs per multiprocessor: as many as its shared memory holds at once.
_PROGRAMS_PER_PROCESSOR = 3


class TritonAttention(PagedAttention):
    """Implements `kernels.ops.Attention`.

    Args:
        num_processors: multiprocessors of the device, over which decoding spreads.
        deterministic: attend to every token by the same operations: as part of a prompt, whose
            kernel takes keys in tiles that do not depend on anything else.
    """

    def __init__(self, num_processors: int, deterministic: bool = False) -> None:
        super().__init__(_zeros)
        self._num_programs = num_processors * _PROGRAMS_PER_PROCESSOR
        self._deterministic = deterministic

    def store(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        store(k, v, cache, slots)

    def plan(self, inputs: AttentionInputs, spec: PagedKV) -> AttentionInputs:
        if self._deterministic:
            return replace(inputs, decodes=NO_DECODES)
        plan = plan_decodes(inputs, self._num_programs, spec.num_kv_heads)
        return replace(inputs, plan=plan)

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
            return super().attend(q, cache, inputs, scale, window, softcap, sinks)
        q = q.contiguous()
        out = torch.empty_like(q)
        if inputs.decodes.rows > 0:
            decode(q, cache, inputs, inputs.plan, scale, window, softcap, out)
        if inputs.context_lens.shape[0] > inputs.decodes.rows:
            prompts(q, cache, inputs, scale, window, softcap, out, not self._deterministic)
        return out


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As flash-attn needs it: it multiplies what lies past a context by 0, so it must be finite."""
    bits = torch.uint8 if dtype.itemsize == 1 else dtype  # not all ops are there for float8
    return torch.zeros(shape, dtype=bits).view(dtype)
