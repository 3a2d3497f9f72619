"""Every op in plain torch: the path that works everywhere, and the oracle for the fast ones.

Shapes use T = tokens in the step (all requests end to end), B = requests in the step, H = query
heads, K = key/value heads, D = head dimension, V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantization import (
    Quantization,
    linear_int4,
    linear_int8,
    quantize_int4,
    quantize_int8,
)

KVCache = tuple[Tensor, Tensor]
Linear = Callable[[Tensor], Tensor]
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class StepInputs:
    """What the model reads of one step: T tokens of B requests, end to end."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, where each token's keys and values go; -1 is nowhere
    context_lens: Tensor  # [B] int32
    block_tables: Tensor  # [B, M] int32


def prepare_step(
    rows: Tensor,
    starts: Tensor,
    query_starts: Tensor,
    num_tokens: int,
    token_table: Tensor,
    block_table: Tensor,
    block_size: int,
) -> StepInputs:
    """Look up what a step computes in the device's tables.

    Request i of the step computes tokens starts[i], starts[i] + 1, ... of table row rows[i], as
    many as query_starts has it. A request whose row is -1 only pads the batch: its context is
    empty, its token is 0 at position 0, and nothing of it is kept.

    Args:
        rows, starts: [B] int32.
        query_starts: [B + 1] int32, from 0 to num_tokens.
        token_table: [rows, max_len] int64.
        block_table: [rows, M] int32.
    """
    lengths = query_starts.diff()
    index = torch.arange(num_tokens, device=rows.device)
    request = torch.arange(len(rows), device=rows.device).repeat_interleave(
        lengths, output_size=num_tokens
    )
    real = rows[request] >= 0
    token_rows = rows[request].long().clamp(min=0)
    positions = torch.where(real, starts[request] + index - query_starts[request], 0).long()
    slots = block_table[token_rows, positions // block_size].long() * block_size
    return StepInputs(
        token_ids=torch.where(real, token_table[token_rows, positions], 0),
        positions=positions,
        slots=torch.where(real, slots + positions % block_size, -1),
        context_lens=torch.where(rows >= 0, starts + lengths, 0).int(),
        block_tables=block_table[rows.long().clamp(min=0)],
    )


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows [T, N] of weight [V, N] at token_ids [T] int64, each of which must be below V."""
    return F.embedding(token_ids, weight)


def new_kv_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    allocate: Callable[..., Tensor] = torch.empty,
) -> KVCache:
    """One layer's keys and values, each [num_blocks, K, block_size, D], in memory by `allocate`.

    Contents are undefined. A head's rows of one block are contiguous, so that attention streams
    them.
    """
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    with device:
        return allocate(shape, dtype=dtype), allocate(shape, dtype=dtype)


def store_kv(k: Tensor, v: Tensor, kv_cache: KVCache, slots: Tensor) -> None:
    """Write k, v [T, K, D] at slots [T] int64: block * block_size + offset; -1 is nowhere.

    A cache of float8_e4m3fn takes values up to +-448, and what lies beyond as that.
    """
    block_size = kv_cache[0].shape[2]
    kept = slots >= 0
    blocks, offsets = slots[kept] // block_size, slots[kept] % block_size
    for cache, new in zip(kv_cache, (k[kept], v[kept]), strict=True):
        if cache.dtype == torch.float8_e4m3fn:
            new = new.float().clamp(-FP8_MAX, FP8_MAX)
        cache[blocks, :, offsets] = new.to(cache.dtype)


def plan_attention(
    query_starts: Tensor,
    context_lens: Tensor,
    num_decodes: int,
    max_query_len: int,
    num_kv_heads: int,
) -> Any:
    """What the attention of all layers of a step can share; opaque, None if that is nothing.

    Args:
        query_starts, context_lens: see `paged_attention`.
        num_decodes: the first requests of the step, which have one query each.
        max_query_len: most queries of any request.
    """
    return None


def paged_attention(
    q: Tensor,
    kv_cache: KVCache,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    plan: Any = None,
) -> Tensor:
    """Causal attention of variable-length queries over a paged cache.

    Request i owns queries q[query_starts[i]:query_starts[i + 1]]; they are the last ones of its
    context_lens[i] tokens, whose keys and values (its own included) are already in the cache.

    Args:
        q: [T, H, D], H a multiple of K.
        query_starts: [B + 1] int32, cumulative query counts from 0 to T.
        context_lens: [B] int32.
        block_tables: [B, M] int32, entries past a request's last block are never read.
        window: a query sees itself and the window - 1 tokens before it; None sees all.
        softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2; None leaves them.
        plan: what the same table's `plan_attention` made of the step.
    Returns:
        [T, H, D], q's dtype.
    """
    out = torch.empty_like(q)
    k_cache, v_cache = kv_cache
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    starts = query_starts.tolist()
    for i, context_len in enumerate(context_lens.tolist()):
        start, end = starts[i], starts[i + 1]
        if start == end or context_len == 0:  # of padding, zeros come out
            out[start:end] = 0
            continue
        blocks = block_tables[i, : -(-context_len // block_size)].long()
        # [blocks, K, block_size, D] -> [1, K, context, D]
        k, v = (
            cache[blocks]
            .transpose(0, 1)
            .reshape(1, num_kv_heads, -1, head_dim)[:, :, :context_len]
            .to(q.dtype)
            for cache in (k_cache, v_cache)
        )
        query_positions = torch.arange(context_len - (end - start), context_len, device=q.device)
        key_positions = torch.arange(context_len, device=q.device)
        distance = query_positions[:, None] - key_positions[None, :]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        queries = q[start:end].transpose(0, 1).unsqueeze(0)
        if softcap is None:
            attended = F.scaled_dot_product_attention(
                queries, k, v, attn_mask=visible, scale=scale, enable_gqa=True
            )
        else:
            attended = _attend_capped(queries, k, v, visible, scale, softcap)
        out[start:end] = attended[0].transpose(0, 1)
    return out


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention of q [1, H, T, D] over k and v [1, K, context, D] with capped scores."""
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = softcap * torch.tanh((q @ k.mT).float() * scale / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.to(q.dtype) @ v


def pack_linear(
    weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None
) -> Linear:
    """The map x [T, in] -> x @ weight.T + bias [T, out], for weight [out, in] and bias [out].

    It may hold the weight in another layout: a caller that drops its own keeps one copy.
    """
    if quantization == "w8a8":
        quantized, scales = quantize_int8(weight)
        return partial(linear_int8, weight=quantized, scales=scales, bias=bias)
    if quantization == "int4":
        quantized, scales = quantize_int4(weight)
        return partial(linear_int4, weight=quantized, scales=scales, bias=bias)
    return partial(F.linear, weight=weight, bias=bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., N] over its root mean square, times weight [N]; computed in float32."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the pair every pre-norm block needs."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [T, H, D] and k [T, K, D] by position (halves rotated, as in GPT-NeoX).

    positions [T] int64; cos_sin [max_position, D] float32, cosines then sines of D / 2 angles.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    return rotate(q), rotate(k)


def norm_rotary_store(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: KVCache,
    slots: Tensor,
) -> Tensor:
    """What lies between the qkv projection and attention: `rms_norm`, `rotary`, `store_kv`.

    Args:
        qkv: [T, (H + 2 * K) * D]: queries, keys, values.
        norms: weights [D] of the query norm and the key norm, in models that have them.
        positions, cos_sin: see `rotary`.
        slots: see `store_kv`.
    Returns:
        Queries [T, H, D], ready for `paged_attention`.
    """
    _, num_kv_heads, _, head_dim = kv_cache[0].shape
    heads = qkv.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    q, k = rotary(q, k, positions, cos_sin)
    store_kv(k, v, kv_cache, slots)
    return q


def silu_and_mul(x: Tensor) -> Tensor:
    """SiLU(gate) * up for x [T, 2 * N] = gate, up side by side; returns [T, N]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finalizer on int64 tensors (arithmetic wraps, shifts are made logical)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One float64 in [0, 1) per (seed, position), both [N] int64, and from nothing else.

    Counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), on the
    splitmix64 mixer: what a request samples never depends on who shares its batch.
    """
    bits = _mix(_mix(seeds) + (positions + 1) * -0x61C8864680B583EB)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Draw one token per row of logits [N, V] by inverting the CDF at uniform(seed, position).

    Temperature is applied first, then min_p, top_k and top_p, each on what the one before left.
    All other arguments are [N]: temperature float32 (0 = greedy, the rest is then ignored), top_k
    int64 (0 = off), top_p and min_p float32 (1 and 0 = off), seeds and positions int64.

    Returns: token ids [N] int64.
    """
    greedy_tokens = logits.argmax(-1)
    greedy = temperature == 0
    if bool(greedy.all()):
        return greedy_tokens
    logits = logits.float()
    # Relative to the best, so that no temperature is low enough to make it overflow.
    logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    probs = torch.softmax(logits, -1)
    if bool((min_p > 0).any()):
        floor = probs.amax(-1, keepdim=True) * min_p.unsqueeze(1)
        probs = torch.where(probs < floor, 0.0, probs)
    if bool((top_k > 0).any()) or bool((top_p < 1).any()):
        probs = _keep_top(probs, top_k, top_p)
    cdf = probs.double().cumsum(-1)
    drawn = uniform(seeds, positions).unsqueeze(1) * cdf[:, -1:]
    # The first token whose cumulative probability exceeds the draw; rounding must not pass the end.
    tokens = torch.searchsorted(cdf, drawn, right=True).squeeze(1)
    last_possible = probs.shape[-1] - 1 - (probs.flip(-1) > 0).to(torch.uint8).argmax(-1)
    return torch.where(greedy, greedy_tokens, torch.minimum(tokens, last_possible))


def _keep_top(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero everything outside the top_k most probable and the smallest set holding top_p."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    k = torch.where(top_k > 0, top_k, probs.shape[-1]).unsqueeze(1)
    ordered = torch.where(rank < k, ordered, 0.0)
    before = ordered.double().cumsum(-1) - ordered
    budget = top_p.double().unsqueeze(1) * ordered.double().sum(-1, keepdim=True)
    # A token stays while those before it do not yet hold top_p; the first always stays.
    ordered = torch.where((before < budget) | (rank == 0), ordered, 0.0)
    return torch.zeros_like(probs).scatter_(-1, order, ordered)


def penalize(
    logits: Tensor,
    token_ids: Tensor,
    num_tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalize, in place, the tokens that rows of logits [N, V] float32 have had already.

    Semantics as in vLLM: the logit of every token of prompt or output is divided by `repetition`
    if positive and multiplied by it if not (Keskar et al., "CTRL", 2019); then it loses
    frequency * (times in the output), and presence if it is in the output at all. Only logits of
    tokens in the text are touched, so the cost does not grow with the vocabulary.

    Args:
        token_ids: [N, L] int64, prompt and output of each row; what follows num_tokens is ignored.
        num_tokens: [N] int64, at least 1.
        counts: [N, L] int32, how often token_ids[n, l] is in row n's output.
        repetition, presence, frequency: [N] float32; 1, 0 and 0 are off.
    """
    # A token that comes twice is written twice with the same value; padding repeats the first.
    padding = torch.arange(token_ids.shape[1], device=logits.device) >= num_tokens.unsqueeze(1)
    token_ids = torch.where(padding, token_ids[:, :1], token_ids)
    counts = torch.where(padding, counts[:, :1], counts)
    seen = logits.gather(1, token_ids)
    repetition = repetition.unsqueeze(1)
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= frequency.unsqueeze(1) * counts + presence.unsqueeze(1) * (counts > 0)
    logits.scatter_(1, token_ids, seen)


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    """Set to -inf, in place, what is not allowed in logits [N, V] float32.

    bitmask: [N, ceil(V / 32)] int32; token t is allowed if bit t % 32 of word t // 32 is set.
    """
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((bitmask.unsqueeze(-1) >> bits) & 1).bool().flatten(1)
    logits.masked_fill_(~allowed[:, : logits.shape[1]], -torch.inf)


def top_logprobs(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of one given token and of the `count` most probable ones, per row.

    Args:
        logits: [N, V].
        token_ids: [N] int64, the given tokens.
    Returns:
        (ids [N, 1 + count] int64, logprobs [N, 1 + count] float32, ranks [N] int64). The given
        token comes first, then the others from the most probable on (it may be among them). The
        rank of a given token is 1 if none is more probable.
    """
    logits = logits.float()
    given = token_ids.unsqueeze(1)
    own = logits.gather(1, given)
    top, ids = logits.topk(count, dim=-1)
    logprobs = torch.cat((own, top), 1) - logits.logsumexp(-1, keepdim=True)
    return torch.cat((given, ids), 1), logprobs, 1 + (logits > own).sum(-1)
