"""Sampling without sorting: one program per row, which reads it twice where few tokens are left.

The cuts of top-k, top-p and min-p keep a prefix of the tokens ordered by probability, ties by token
id. The first pass over the row finds the best of each of many parts of it. As many parts as are
wanted have a token at or above the least of their best ones, so that bounds the prefix from below:
the second pass puts the few tokens above the bound aside, and each of them counts what is ahead of
it (`_pick`).

Where too many are above it, the thresholds are bisected over the values that occur (`_search`):
each pass over the row counts and sums what is above the middle, and notes the nearest values on
both sides, so that an interval ends on values of the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.launch import launch, next_power_of_2
from kernels.cuda.logits import apply_bitmask, penalize, top_logprobs
from kernels.types import SamplingTable

__all__ = ["apply_bitmask", "penalize", "sample", "top_logprobs"]  # `kernels.ops.Sampling`

_BLOCK = 8192
_PARTS = 1024
# Tokens that can be put aside, and how many are wanted where top-p alone decides.
_CANDIDATES = 1024
_WANTED = 256


@triton.jit
def _mix(x):
    """The splitmix64 finalizer, as `reference._mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _uniform(seed, position):
    """As `reference.uniform`."""
    bits = _mix(_mix(seed) + (position + 1) * -0x61C8864680B583EB)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _scaled(logits, start, vocab, best, temperature, BLOCK: tl.constexpr):
    """Logits less the best, over the temperature: their exponentials are the weights."""
    tokens = start + tl.arange(0, BLOCK)
    x = tl.load(logits + tokens, tokens < vocab, float("-inf")).to(tl.float32)
    return (x - best) / temperature


@triton.jit
def _split(logits, vocab, best, temperature, low, middle, BLOCK: tl.constexpr):
    """Of the values at or above low: (how many are at or above middle, their weight, the least of
    them, the greatest below middle)."""
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    above = tl.full([], float("inf"), tl.float32)
    below = tl.full([], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        z = _scaled(logits, start, vocab, best, temperature, BLOCK)
        over = z >= middle
        count += tl.sum(over.to(tl.int32), 0)
        mass += tl.sum(tl.where(over, tl.exp(z), 0.0), 0).to(tl.float64)
        above = tl.minimum(above, tl.min(tl.where(over, z, float("inf")), 0))
        beneath = (z >= low) & (z < middle)
        below = tl.maximum(below, tl.max(tl.where(beneath, z, float("-inf")), 0))
    return count, mass, above, below


@triton.jit
def _cut(logits, vocab, best, temperature, low, enough, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The shortest prefix that has `enough` (tokens, or weight), given that those from low on have.

    Returns the least value in it, how many of the tokens that equal it are in, and its weight.
    """
    floor = low
    high = tl.zeros([], tl.float32)  # the best token's
    count_above = tl.zeros([], tl.int32)  # of high
    mass_above = tl.zeros([], tl.float64)
    ties = vocab
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        count, mass, above, below = _split(logits, vocab, best, temperature, floor, middle, BLOCK)
        if BY_MASS:
            reached = mass >= enough
            exact = reached & False
        else:
            reached = count >= enough
            exact = count == enough
        low = tl.where(reached, above, low)
        # Should rounding leave nothing in between, the interval ends all the same.
        high = tl.where(exact, above, tl.where(reached, high, tl.maximum(below, low)))
        count_above = tl.where(reached, tl.where(exact, 0, count_above), count)
        mass_above = tl.where(reached & (exact == 0), mass_above, mass)
        ties = tl.where(exact, 0, ties)
    weight = tl.exp(low).to(tl.float64)
    if BY_MASS:
        ties = tl.maximum(tl.ceil((enough - mass_above) / weight).to(tl.int32), 1)
        return low, ties, mass_above + ties.to(tl.float64) * weight
    else:
        all_in = ties == 0  # the count came out exactly: mass_above is that of the whole prefix
        rest = (enough - count_above).to(tl.int32)
        mass = tl.where(all_in, mass_above, mass_above + rest.to(tl.float64) * weight)
        return low, tl.where(all_in, vocab, rest), mass


@triton.jit
def _read(logits, vocab, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The best logit, the first token that has it, and the best of each of the row's parts."""
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    firsts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, ids < vocab, float("-inf")).to(tl.float32)
        firsts = tl.where(x > peaks, ids, firsts)
        peaks = tl.maximum(peaks, x)
    best = tl.max(peaks, 0)
    token = tl.min(tl.where(peaks == best, firsts, vocab), 0)
    return best, token, tl.max(tl.reshape(peaks, [PARTS, BLOCK // PARTS]), 1)


@triton.jit
def _put_aside(
    logits, vocab, best, temperature, cut, bound, tokens, values,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Write the tokens from the bound on, in order, as far as there is room for them.

    Returns how many there are, and the weight of all from the cut on.
    """
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = _scaled(logits, start, vocab, best, temperature, BLOCK)
        mass += tl.sum(tl.where(z >= cut, tl.exp(z), 0.0), 0).to(tl.float64)
        above = (z >= bound).to(tl.int32)
        at = count + tl.cumsum(above, 0) - above
        kept = (above > 0) & (at < CANDIDATES)
        tl.store(tokens + at, ids, kept)
        tl.store(values + at, z, kept)
        count += tl.sum(above, 0)
    return count, mass


@triton.jit
def _pick(
    tokens, values, count, top_k, top_p, mass, u, CANDIDATES: tl.constexpr, STEP: tl.constexpr
):
    """Draw from the tokens that were put aside; -1 if top-p reaches beyond them."""
    own = tl.arange(0, CANDIDATES)
    z = tl.load(values + own, own < count, float("-inf"))
    ahead = tl.zeros([CANDIDATES], tl.int32)  # how many are
    before = tl.zeros([CANDIDATES], tl.float64)  # and their weight
    for first in range(0, count, STEP):
        other = first + tl.arange(0, STEP)
        of_other = tl.load(values + other, other < count, float("-inf"))[None, :]
        is_ahead = (of_other > z[:, None]) | (
            (of_other == z[:, None]) & (other[None, :] < own[:, None])
        )
        ahead += tl.sum(is_ahead.to(tl.int32), 1)
        before += tl.sum(tl.where(is_ahead, tl.exp(of_other), 0.0), 1).to(tl.float64)
    kept = own < count
    held = tl.sum(tl.where(kept, tl.exp(z), 0.0), 0).to(tl.float64)
    if top_k > 0:
        kept = kept & (ahead < top_k)
        mass = tl.sum(tl.where(kept, tl.exp(z), 0.0), 0).to(tl.float64)
    budget = mass * top_p.to(tl.float64)
    if top_p < 1:
        kept = kept & ((before < budget) | (ahead == 0))
    weights = tl.where(kept, tl.exp(z), 0.0)
    drawn = u * tl.sum(weights, 0).to(tl.float64)
    passed = kept & (tl.cumsum(weights, 0) > drawn.to(tl.float32))
    index = tl.min(tl.where(passed, own, CANDIDATES), 0)
    index = tl.where(index < CANDIDATES, index, tl.max(tl.where(kept, own, 0), 0))
    return tl.where((top_k > 0) | (held >= budget), tl.load(tokens + index), -1)


@triton.jit
def _search(
    logits, vocab, best, best_token, temperature, cut, top_k, top_p, u, BLOCK: tl.constexpr
):
    """Draw from the whole row."""
    count, mass, _, _ = _split(logits, vocab, best, temperature, cut, cut, BLOCK)
    ties = vocab  # how many of the tokens that equal the cut are in
    if (top_k > 0) & (top_k < count):
        cut, ties, mass = _cut(logits, vocab, best, temperature, cut, top_k, False, BLOCK)
    if top_p < 1:
        budget = mass * top_p.to(tl.float64)
        shorter, shorter_ties, mass = _cut(
            logits, vocab, best, temperature, cut, budget, True, BLOCK
        )
        ties = tl.where(shorter == cut, tl.minimum(ties, shorter_ties), shorter_ties)
        cut = shorter
    drawn = u * mass
    before = tl.zeros([], tl.float64)
    num_ties = tl.zeros([], tl.int32)
    token = tl.full([], -1, tl.int32)
    last = best_token
    start = 0
    while (token < 0) & (start < vocab):
        ids = start + tl.arange(0, BLOCK)
        z = _scaled(logits, start, vocab, best, temperature, BLOCK)
        equal = (z == cut).to(tl.int32)
        rank = num_ties + tl.cumsum(equal, 0)  # from 1
        kept = (z > cut) | ((equal > 0) & (rank <= ties))
        weights = tl.where(kept, tl.exp(z), 0.0)
        passed = kept & (tl.cumsum(weights, 0) > (drawn - before).to(tl.float32))
        first = tl.min(tl.where(passed, ids, vocab), 0)
        token = tl.where(first < vocab, first, -1)
        last = tl.maximum(last, tl.max(tl.where(kept, ids, 0), 0))
        before += tl.sum(weights, 0).to(tl.float64)
        num_ties += tl.sum(equal, 0)
        start += BLOCK
    return tl.where(token < 0, last, token)


# These are parts of larger tensors, which begin anywhere.
_PARTS_OF_TENSORS = ["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "rows", "positions"]


@triton.jit(do_not_specialize_on_alignment=_PARTS_OF_TENSORS)
def _sample_kernel(
    logits, logits_stride, vocab, temperatures, top_ks, top_ps, min_ps, seeds, rows, positions,
    out, tokens, values,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, CANDIDATES: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    best, best_token, peaks = _read(logits, vocab, BLOCK, PARTS)
    of = tl.load(rows + row)  # its row of the table
    temperature = tl.load(temperatures + of)
    # Of a model that has overflowed, weights are no numbers: the first of its best will do.
    if (temperature == 0) | (tl.abs(best) == float("inf")):
        tl.store(out + row, best_token.to(tl.int64))
        return
    temperature = tl.maximum(temperature, 1e-30)  # below it is greedy but for exact ties

    # Weights under e^-80 of the best are nothing beside it, whatever their number.
    min_p = tl.load(min_ps + of)
    cut = tl.where(min_p > 0, tl.maximum(tl.log(min_p), -80.0), -80.0)
    top_k = tl.load(top_ks + of)
    top_p = tl.load(top_ps + of)
    u = _uniform(tl.load(seeds + of), tl.load(positions + row))
    token = tl.full([], -1, tl.int32)
    if (top_k > 0) | (top_p < 1):
        wanted = tl.where(top_k > 0, top_k, WANTED)
        z = (peaks - best) / temperature
        bound, above = cut, tl.zeros([], tl.float32)
        for _ in range(12):  # of 80, that is within 0.02 of the best there is
            middle = (bound + above) * 0.5
            enough = tl.sum((z >= middle).to(tl.int32), 0) >= wanted
            bound = tl.where(enough, middle, bound)
            above = tl.where(enough, above, middle)
        tokens += row * CANDIDATES
        values += row * CANDIDATES
        count, mass = _put_aside(
            logits, vocab, best, temperature, cut, bound, tokens, values, BLOCK, CANDIDATES
        )
        tl.debug_barrier()  # what is put aside is read by other threads
        if count <= CANDIDATES:
            token = _pick(tokens, values, count, top_k, top_p, mass, u, CANDIDATES, 16)
    if token < 0:
        token = _search(logits, vocab, best, best_token, temperature, cut, top_k, top_p, u, BLOCK)
    tl.store(out + row, token.to(tl.int64))


def sample(logits: Tensor, table: SamplingTable, rows: Tensor, positions: Tensor) -> Tensor:
    num_rows, vocab = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    tokens = torch.empty(num_rows, _CANDIDATES, dtype=torch.int32, device=logits.device)
    values = torch.empty(num_rows, _CANDIDATES, dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, next_power_of_2(vocab))
    if num_rows > 0:
        launch(
            _sample_kernel,
            (num_rows,),
            logits,
            logits.stride(0),
            vocab,
            *table,
            rows,
            positions,
            out,
            tokens,
            values,
            BLOCK=block,
            PARTS=min(_PARTS, block),
            CANDIDATES=_CANDIDATES,
            WANTED=_WANTED,
            num_warps=16,
        )
    return out
