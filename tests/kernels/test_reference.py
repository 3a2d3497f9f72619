"""The torch ops, against definitions written out plainly."""

import random

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from kernels import reference
from kernels.ops import REFERENCE
from kernels.types import PagedKV
from tests.kernels.steps import inputs_of, poisoned_cache


def test_our_kernels_package_is_not_mistaken_for_hugging_faces() -> None:
    """transformers uses a package of that name when it is there; ours is another."""
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


# --- Paged attention --------------------------------------------------------------------------


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    """One request, by the formula: q [Q, H, D] are the last queries of k, v [C, K, D]."""
    num_queries, num_heads, _ = q.shape
    context_len, kv_heads, _ = k.shape
    out = torch.zeros_like(q)
    for i in range(num_queries):
        position = context_len - num_queries + i
        first = 0 if window is None else max(position - window + 1, 0)
        for head in range(num_heads):
            kv_head = head // (num_heads // kv_heads)
            scores = k[first : position + 1, kv_head] @ q[i, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[i, head] = scores.softmax(0) @ v[first : position + 1, kv_head]
    return out


def check_attention(
    lengths: list[tuple[int, int]],
    block_size: int = 4,
    num_heads: int = 4,
    kv_heads: int = 2,
    window: int | None = None,
    seed: int = 0,
    softcap: float | None = None,
) -> None:
    """A batch of (queries, context) requests in scattered blocks equals each one on its own."""
    head_dim = 8
    torch.manual_seed(seed)
    counts = [-(-context // block_size) for _, context in lengths]
    spec = PagedKV(block_size, kv_heads, head_dim, torch.float32)
    cache = poisoned_cache(sum(counts) + 3, spec)
    blocks = torch.randperm(sum(counts) + 3).tolist()
    # Past a request's last block, tables hold what no one may follow.
    tables = torch.full((len(lengths), max(counts) + 2), 10**6, dtype=torch.int32)
    queries, expected = [], []
    for row, (num_queries, context_len) in enumerate(lengths):
        table = torch.tensor([blocks.pop() for _ in range(counts[row])])
        tables[row, : counts[row]] = table
        k, v = torch.randn(2, context_len, kv_heads, head_dim)
        at = torch.arange(context_len)
        slots = table[at // block_size] * block_size + at % block_size
        reference.attention.store(k, v, cache, slots)
        q = torch.randn(num_queries, num_heads, head_dim)
        queries.append(q)
        expected.append(dense_attention(q, k, v, scale=0.3, window=window, softcap=softcap))
    out = reference.attention.attend(
        torch.cat(queries),
        cache,
        inputs_of(lengths, tables),
        scale=0.3,
        window=window,
        softcap=softcap,
    )
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_attention_of_one_token() -> None:
    check_attention([(1, 1)])


def test_attention_at_block_edges() -> None:
    check_attention([(1, 3), (1, 4), (1, 5), (3, 8), (4, 8), (5, 9), (8, 8), (9, 9)])


def test_attention_of_a_row_without_queries() -> None:
    check_attention([(2, 5), (0, 4), (1, 7)])


@pytest.mark.parametrize("window", [1, 2, 4, 5, 9, 100])
def test_attention_window(window: int) -> None:
    check_attention([(1, 1), (1, 13), (6, 13), (13, 13), (4, 4)], window=window)


@pytest.mark.parametrize("softcap", [0.5, 3.0])
def test_attention_with_capped_scores(softcap: float) -> None:
    check_attention([(1, 1), (1, 13), (6, 13), (13, 13)], window=5, softcap=softcap)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 1), (6, 2), (6, 3)])
def test_attention_with_heads_sharing_keys(heads: int, kv_heads: int) -> None:
    check_attention([(3, 7), (1, 6)], num_heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("seed", range(20))
def test_attention_of_random_ragged_batches(seed: int) -> None:
    rng = random.Random(seed)
    contexts = [rng.randint(1, 24) for _ in range(rng.randint(1, 6))]
    check_attention(
        [(rng.randint(1, context), context) for context in contexts],
        block_size=rng.choice([1, 2, 3, 4, 8, 16]),
        window=rng.choice([None, None, 3, 8]),
        seed=seed,
    )


def test_attention_output_has_the_type_of_the_queries() -> None:
    cache = poisoned_cache(1, PagedKV(4, 1, 8, torch.float32))
    ones = torch.ones(1, 1, 8)
    reference.attention.store(ones, ones, cache, torch.tensor([0]))
    inputs = inputs_of([(1, 1)], torch.zeros(1, 1, dtype=torch.int32))
    out = reference.attention.attend(ones.bfloat16(), cache, inputs, scale=1.0)
    assert out.dtype == torch.bfloat16
    assert out.eq(1).all()


def test_store_writes_these_slots_and_no_others() -> None:
    cache = poisoned_cache(3, PagedKV(4, 2, 8, torch.float32))
    k, v = torch.randn(2, 3, 2, 8)
    slots = [9, 2, 4]  # (block 2, offset 1), (0, 2), (1, 0)
    reference.attention.store(k, v, cache, torch.tensor(slots))
    for part, new in zip(cache.tensors, (k, v), strict=True):
        for i, slot in enumerate(slots):
            assert part[slot // 4, :, slot % 4].equal(new[i])
        assert part.isfinite().sum() == new.numel()


# --- Norms, rotary, activation ----------------------------------------------------------------


def test_rms_norm() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 16) * 3, torch.randn(16)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_like_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = Qwen3RMSNorm(64, eps=1e-6).to(dtype)
    theirs.weight.data.normal_()
    x = torch.randn(9, 64).to(dtype)
    assert reference.rms_norm(x, theirs.weight, 1e-6).equal(theirs(x))


def test_add_rms_norm_returns_normed_sum_and_sum() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    before = residual.clone()
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert total.equal(x + before)
    assert normed.equal(reference.rms_norm(x + before, weight, 1e-6))


def test_rotary_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    head_dim, positions = 16, torch.tensor([0, 1, 5, 63, 2])
    config = Qwen3Config(
        head_dim=head_dim, rope_parameters=dict(rope_type="default", rope_theta=1e4)
    )
    angles = torch.outer(torch.arange(64.0), 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    q, k = torch.randn(5, 4, head_dim), torch.randn(5, 2, head_dim)
    cos, sin = Qwen3RotaryEmbedding(config)(q, positions.unsqueeze(0))
    expected = apply_rotary_pos_emb(
        q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), cos, sin
    )
    ours = reference.rotary(q, k, positions, cos_sin)
    for rotated, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(rotated, other[0].transpose(0, 1))


def test_rotary_turns_pairs_of_halves_by_their_angle() -> None:
    """Dimension i and i + D/2 are a complex number, turned by position * frequency i."""
    q = torch.randn(1, 1, 4)
    angles = torch.tensor([0.5, 2.0])
    cos_sin = torch.zeros(8, 4)
    cos_sin[7] = torch.cat((angles.cos(), angles.sin()))
    turned, _ = reference.rotary(q, q, torch.tensor([7]), cos_sin)
    expected = torch.complex(q[..., :2], q[..., 2:]) * torch.polar(torch.ones(2), angles)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1))


@pytest.mark.parametrize("normed", [True, False], ids=["with norms", "without"])
def test_norm_rotary_store_is_the_three_in_turn(normed: bool) -> None:
    torch.manual_seed(0)
    heads, kv_heads, head_dim, eps = 4, 2, 8, 1e-5
    qkv = torch.randn(5, (heads + 2 * kv_heads) * head_dim)
    q, k, v = (
        part.unflatten(1, (-1, head_dim))
        for part in qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    )
    norms = (torch.randn(head_dim), torch.randn(head_dim)) if normed else None
    positions, slots = torch.tensor([3, 0, 1, 7, 2]), torch.tensor([9, 2, 4, 0, 11])
    angles = torch.rand(8, head_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    spec = PagedKV(4, kv_heads, head_dim, torch.float32)
    cache, expected_cache = (poisoned_cache(3, spec) for _ in range(2))

    ours = REFERENCE.norm_rotary_store(qkv, norms, eps, positions, cos_sin, cache, slots)

    if norms is not None:
        q, k = reference.rms_norm(q, norms[0], eps), reference.rms_norm(k, norms[1], eps)
    q, k = reference.rotary(q, k, positions, cos_sin)
    reference.attention.store(k, v, expected_cache, slots)
    assert ours.equal(q)
    for part, expected in zip(cache.tensors, expected_cache.tensors, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bias", [None, torch.arange(3.0)], ids=["no bias", "bias"])
def test_pack_linear_keeps_the_map(bias: Tensor | None) -> None:
    weight, x = torch.randn(3, 5), torch.randn(4, 5)
    expected = x @ weight.T + (0.0 if bias is None else bias)
    torch.testing.assert_close(reference.pack_linear(weight, bias)(x), expected)


def test_silu_and_mul() -> None:
    gate, up = torch.randn(2, 6, 10)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(reference.silu_and_mul(torch.cat((gate, up), -1)), expected)
