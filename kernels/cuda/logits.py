"""What is done to logits before a token is drawn: penalties, and masks of allowed tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.launch import cdiv, launch, next_power_of_2

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
        launch(
            _penalize_kernel,
            (rows, cdiv(length, _BLOCK)),
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
        launch(
            _apply_bitmask_kernel,
            (rows, cdiv(vocab, _BLOCK)),
            logits,
            logits.stride(0),
            bitmask,
            bitmask.stride(0),
            vocab,
            BLOCK=_BLOCK,
            num_warps=4,
        )


@triton.jit(do_not_specialize_on_alignment=["token_ids"])
def _weigh_kernel(logits, logits_stride, vocab, token_ids, sums, ranks, BLOCK: tl.constexpr):
    """The logarithm of the sum of a row's exponentials, and how many tokens beat the given one."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    own = tl.load(logits + tl.load(token_ids + row)).to(tl.float32)
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    better = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, ids < vocab, float("-inf")).to(tl.float32)
        new_peaks = tl.maximum(peaks, x)
        shift = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
        total = total * tl.exp(peaks - shift) + tl.exp(x - shift)
        better += (x > own).to(tl.int32)
        peaks = new_peaks
    peak = tl.max(peaks, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(sums + row, shift + tl.log(tl.sum(total * tl.exp(peaks - shift), 0)))
    tl.store(ranks + row, 1 + tl.sum(better, 0).to(tl.int64))


def top_logprobs(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.reference.top_logprobs`, without a copy of the logits."""
    rows, vocab = logits.shape
    sums = torch.empty(rows, 1, dtype=torch.float32, device=logits.device)
    ranks = torch.empty_like(token_ids)
    if rows > 0:
        launch(
            _weigh_kernel,
            (rows,),
            logits,
            logits.stride(0),
            vocab,
            token_ids,
            sums,
            ranks,
            BLOCK=min(4096, next_power_of_2(vocab)),
            num_warps=8,
        )
    given = token_ids.unsqueeze(1)
    top, ids = logits.topk(count, dim=-1)
    logprobs = torch.cat((logits.gather(1, given), top), 1).float() - sums
    return torch.cat((given, ids), 1), logprobs, ranks
