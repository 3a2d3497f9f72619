"""What is done to logits before a token is drawn: penalties, and masks of allowed tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(
    do_not_specialize=["token_stride", "count_stride", "length"],
    do_not_specialize_on_alignment=["num_tokens", "repetitions", "presences", "frequencies"],
)
def _penalize_kernel(
    logits, logits_stride, token_ids, token_stride, num_tokens, counts, count_stride,
    repetitions, presences, frequencies, penalized, length,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of one row's text: compute their logits into `penalized`, or write those back.

    In two launches, for a token that comes twice must not be read after it was written.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.minimum(tl.load(num_tokens + row), length)
    token = tl.load(token_ids + row * token_stride + at, inside, 0)
    where = logits + row * logits_stride + token
    if WRITE:
        tl.store(where, tl.load(penalized + row * length + at, inside, 0.0), inside)
    else:
        value = tl.load(where, inside, 0.0)
        repetition = tl.load(repetitions + row)
        value = tl.where(value > 0, value / repetition, value * repetition)
        count = tl.load(counts + row * count_stride + at, inside, 0)
        value -= tl.load(frequencies + row) * count + tl.where(
            count > 0, tl.load(presences + row), 0.0
        )
        tl.store(penalized + row * length + at, value, inside)


def penalize(
    logits: Tensor,
    token_ids: Tensor,
    num_tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    rows, length = token_ids.shape
    penalized = torch.empty(rows, length, dtype=logits.dtype, device=logits.device)
    for write in (False, True):
        _penalize_kernel[(rows, triton.cdiv(length, _BLOCK))](
            logits,
            logits.stride(0),
            token_ids,
            token_ids.stride(0),
            num_tokens,
            counts,
            counts.stride(0),
            repetition.contiguous(),
            presence.contiguous(),
            frequency.contiguous(),
            penalized,
            length,
            WRITE=write,
            BLOCK=_BLOCK,
            num_warps=4,
        )


@triton.jit
def _apply_bitmask_kernel(logits, logits_stride, bitmask, mask_stride, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab
    words = tl.load(bitmask + row * mask_stride + tokens // 32, inside, 0)
    banned = inside & (((words >> (tokens % 32)) & 1) == 0)
    tl.store(logits + row * logits_stride + tokens, float("-inf"), banned)


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    rows, vocab = logits.shape
    if rows > 0:
        _apply_bitmask_kernel[(rows, triton.cdiv(vocab, _BLOCK))](
            logits,
            logits.stride(0),
            bitmask,
            bitmask.stride(0),
            vocab,
            BLOCK=_BLOCK,
            num_warps=4,
        )
