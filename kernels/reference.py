"""Every op in plain torch: the path that works everywhere, and the oracle for the fast ones.

For the letters in shapes see `kernels.types`.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantization import (
    FP8_MAX,
    Quantization,
    linear_fp8,
    linear_grouped,
    linear_int8,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from kernels.types import (
    AttentionInputs,
    KVCache,
    Linear,
    PagedKV,
    SamplingTable,
    StepInputs,
    StepRows,
)


def prepare_step(
    step: StepRows, token_table: Tensor, block_tables: Tensor, block_size: int
) -> StepInputs:
    """Look up what a step computes in the device's tables.

    Of a request that only pads the batch the context is empty, its token is 0 at position 0, and
    nothing of it is kept.

    Args:
        token_table: [rows, max_len] int64.
        block_tables: [G, rows, M] int32.
    """
    lengths = step.query_starts.diff()
    index = torch.arange(step.num_tokens, device=step.rows.device)
    request = torch.arange(len(step.rows), device=step.rows.device).repeat_interleave(
        lengths, output_size=step.num_tokens
    )
    real = step.rows[request] >= 0
    row = step.rows.long().clamp(min=0)
    positions = step.starts[request] + index - step.query_starts[request]
    positions = torch.where(real, positions, 0).long()
    slots = block_tables[:, row[request], positions // block_size].long() * block_size
    return StepInputs.of(
        step,
        token_ids=torch.where(real, token_table[row[request], positions], 0),
        positions=positions,
        context_lens=torch.where(step.rows >= 0, step.starts + lengths, 0).int(),
        block_tables=block_tables[:, row],
        slots=torch.where(real, slots + positions % block_size, -1),
    )


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows [T, N] of weight [V, N] at token_ids [T] int64, each of which must be below V."""
    return F.embedding(token_ids, weight)


class PagedAttention:
    """Implements `kernels.ops.Attention`. A head's rows of a block are contiguous, to be streamed.

    Args:
        allocate: makes the memory of caches, as `torch.empty` does.
    """

    def __init__(self, allocate: Callable[..., Tensor] = torch.empty) -> None:
        self._allocate = allocate

    def new_cache(self, num_blocks: int, spec: PagedKV, device: torch.device) -> KVCache:
        shape = (num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
        with device:
            keys, values = (self._allocate(shape, dtype=spec.dtype) for _ in range(2))
        return KVCache(spec, keys, values)

    def store(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        block_size = cache.spec.block_size
        kept = slots >= 0
        blocks, offsets = slots[kept] // block_size, slots[kept] % block_size
        for part, new in ((cache.keys, k[kept]), (cache.values, v[kept])):
            if part.dtype == torch.float8_e4m3fn:
                new = new.float().clamp(-FP8_MAX, FP8_MAX)
            part[blocks, :, offsets] = new.to(part.dtype)

    def plan(self, inputs: AttentionInputs, spec: PagedKV) -> AttentionInputs:
        return inputs

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
        out = torch.zeros_like(q)
        starts, block_size = inputs.query_starts.tolist(), cache.spec.block_size
        for i, context_len in enumerate(inputs.context_lens.tolist()):
            start, end = starts[i], starts[i + 1]
            if start == end or context_len == 0:
                continue
            position = context_len - (end - start)  # of the first query
            first_block = 0 if window is None else max(position - window + 1, 0) // block_size
            blocks = inputs.block_tables[i, first_block : -(-context_len // block_size)].long()
            first = first_block * block_size
            # [blocks, K, block_size, D] -> [1, K, context from first on, D]
            k, v = (
                part[blocks].transpose(0, 1).flatten(1, 2)[None, :, : context_len - first]
                for part in cache.tensors
            )
            query_positions = torch.arange(position, context_len, device=q.device)
            key_positions = torch.arange(first, context_len, device=q.device)
            distance = query_positions[:, None] - key_positions[None, :]
            visible = distance >= 0
            if window is not None:
                visible &= distance < window
            queries = q[start:end].transpose(0, 1).unsqueeze(0)
            k, v = k.to(q.dtype), v.to(q.dtype)
            attended = _attend(queries, k, v, visible, scale, softcap, sinks)
            out[start:end] = attended[0].transpose(0, 1)
        return out


attention = PagedAttention()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of q [1, H, T, D] over k and v [1, K, context, D], where visible [T, context]."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale, enable_gqa=True
        )
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = (q @ k.mT).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
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
        return partial(linear_grouped, weight=quantize_int4(weight), bias=bias)
    if quantization == "fp8":
        quantized, scales = quantize_fp8(weight)
        return partial(linear_fp8, weight=quantized, scales=scales, bias=bias)
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


def silu_and_mul(x: Tensor) -> Tensor:
    """SiLU(gate) * up for x [T, 2 * N] = gate, up side by side; returns [T, N]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: Tensor) -> Tensor:
    """As `silu_and_mul`, with GELU by its approximation with tanh."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


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


def sample(logits: Tensor, table: SamplingTable, rows: Tensor, positions: Tensor) -> Tensor:
    """Draw one token per row of logits [N, V] by inverting the CDF at uniform(seed, position).

    Temperature is applied first, then min_p, top_k and top_p, each on what the one before left.
    Row i draws as row rows[i] of the table says, at positions[i]; both are [N] int64.

    Returns: token ids [N] int64.
    """
    temperature, top_k, top_p, min_p, seeds = (column[rows] for column in table)
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
