"""The Triton kernels against their oracles in plain torch, on whatever there is to run them on."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cuda.linear import round_rows
from kernels.cuda.ops import triton_ops
from kernels.ops import REFERENCE
from kernels.quantization import quantize_fp8, quantize_int4
from kernels.types import Decodes, PagedKV, Rounded, StepRows, Table
from tests.kernels import grouped
from tests.kernels.steps import (
    Attention,
    assert_close,
    assert_same_inputs,
    each_tensor,
    inputs_of,
    poison_allocations,
    poisoned_cache,
    random_lengths,
    sampling_on,
)
from tests.kernels.test_cpu_sampling import (
    assert_same_draws,
    assert_some_token_is_drawn,
    params,
)
from tests.triton_interpreter import DEVICE

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Few multiprocessors, so that short contexts are cut into chunks too.
OPS = triton_ops(num_processors=2)


def on_device(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE)


# --- Attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_attention_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    lengths = [(1, 130), (1, 1), (1, 33), (5, 5), (9, 70)]
    Attention(
        random.Random(0), dtype, lengths, head_dim, kv_heads=2, group=2, block_size=16,
        device=DEVICE,
    ).check(OPS)  # fmt: skip


@pytest.mark.parametrize(
    "block_size, window",
    [
        (16, None),
        (16, 24),
        (32, 1),
        (64, 24),
        (128, None),
        (256, 1000),
        (256, 24),
        (7, None),
        (7, 24),
    ],
)
def test_attention_blocks_and_windows(block_size: int, window: int | None) -> None:
    torch.manual_seed(block_size)
    lengths = [(1, 140), (1, 64), (2, 65), (17, 40)]
    Attention(
        random.Random(0), torch.float32, lengths, 16, kv_heads=1, group=2, block_size=block_size,
        window=window, device=DEVICE,
    ).check(OPS)  # fmt: skip


@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_attention_heads_sharing_keys(group: int) -> None:
    torch.manual_seed(group)
    lengths = [(1, 200), (1, 3), (20, 75), (1, 9)]
    Attention(
        random.Random(0), torch.float32, lengths, 16, kv_heads=2, group=group, block_size=16,
        device=DEVICE,
    ).check(OPS)  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_attention_random(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    Attention(
        rng,
        rng.choice(DTYPES),
        random_lengths(rng),
        head_dim=rng.choice([16, 64, 80]),
        kv_heads=rng.choice([1, 2, 3]),
        group=rng.choice([1, 2, 5]),
        block_size=rng.choice([16, 32, 64]),
        window=rng.choice([None, None, 1, rng.randint(1, 200)]),
        device=DEVICE,
    ).check(OPS)


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 100))]
)
def test_attention_of_rows_with_drafts(seed: int) -> None:
    """Rows of 1 .. k + 1 tokens decode, in chunks of their contexts; those with more do not."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    most = rng.choice([2, 4, 9, 17])
    lengths = [
        (rng.randint(1, most), rng.choice([rng.randint(17, 200), 128, rng.randint(250, 500)]))
        for _ in range(rng.randint(1, 5))
    ]
    lengths += [(most + 3, 100)] * rng.randint(0, 1)
    eight_bits = rng.random() < 0.3
    Attention(
        rng,
        torch.bfloat16 if eight_bits else rng.choice(DTYPES),
        lengths,
        head_dim=rng.choice([16, 80]),
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 5, 8]),
        block_size=rng.choice([16, 32, 7]),
        window=rng.choice([None, None, 1, rng.randint(1, 300)]),
        device=DEVICE,
        cache_dtype=FP8 if eight_bits else None,
        softcap=rng.choice([None, None, 2.0]),
    ).check(OPS, most)


def test_attention_of_a_long_context_beside_short_ones() -> None:
    """Its chunks spread over the device; the short ones have one each, a tail."""
    torch.manual_seed(0)
    lengths = [(1, 5), (1, 3001), (1, 128), (1, 129), (1, 128)]
    step = Attention(random.Random(0), torch.float32, lengths, 16, 1, 4, 32, device=DEVICE)
    step.check(OPS)
    inputs = inputs_of(lengths, step.block_tables, DEVICE)
    plan = OPS.attention.plan(inputs, step.cache.spec).plan
    length, full = int(plan.chunk_len), plan.full_starts.diff().tolist()
    assert full[1] >= 4 and full[0] == full[2] == 0
    assert full == [max(context - 1, 0) // length for _, context in lengths]
    assert sum(full) + len(lengths) <= plan.max_chunks
    tails = [context - length * count for (_, context), count in zip(lengths, full, strict=True)]
    order = plan.tail_order.tolist()
    assert sorted(order) == list(range(5)) and order[-1] == 0
    assert [tails[row] for row in order] == sorted(tails, reverse=True)


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_a_plan_of_as_many_chunks_as_run_at_once_or_a_few_times_as_many(rows: int) -> None:
    """The longest first, whatever the number of rows."""
    rng = random.Random(rows)
    contexts = [rng.randint(0, 5000) for _ in range(rows)]
    tables = torch.zeros(rows, 1, dtype=torch.int32)
    inputs = inputs_of([(1, context) for context in contexts], tables, DEVICE)
    ops, kv_heads = triton_ops(num_processors=132), 8
    plan = ops.attention.plan(inputs, PagedKV(16, kv_heads, 64, torch.bfloat16)).plan
    at_once = 132 * 3 // kv_heads
    few = 4 * rows <= at_once
    assert plan.max_chunks == (at_once if few else 3 * at_once + rows)
    length = int(plan.chunk_len)
    assert length % 64 == 0 and length >= max(sum(contexts) / plan.max_chunks, 128)
    full = [max(context - 1, 0) // length for context in contexts]
    assert plan.full_starts.diff().tolist() == full
    tails = [context - length * n for context, n in zip(contexts, full, strict=True)]
    order = sorted(range(rows), key=lambda row: (-tails[row], row))
    assert plan.tail_order.tolist() == order
    assert plan.arrived.eq(0).all() and plan.arrived.numel() == rows * kv_heads


def test_what_counts_chunks_is_ready_for_the_next_layer() -> None:
    torch.manual_seed(0)
    lengths = [(1, 400), (1, 40)]
    step = Attention(random.Random(0), torch.bfloat16, lengths, 16, 2, 2, 16, device=DEVICE)
    cache = each_tensor(step.cache, on_device)
    planned = OPS.attention.plan(inputs_of(lengths, step.block_tables, DEVICE), cache.spec)
    layers = [OPS.attention.attend(on_device(step.q), cache, planned, 0.25) for _ in range(3)]
    assert layers[0].equal(layers[1]) and layers[0].equal(layers[2])
    assert planned.plan.arrived.eq(0).all()


@pytest.mark.parametrize("queries", [[1, 1], [3, 60]], ids=["one each", "any number"])
def test_attention_of_rows_that_pad_a_batch(queries: list[int]) -> None:
    """Requests without context among the decodes: nothing is read for them, and they get zeros."""
    torch.manual_seed(0)
    most = queries[0]
    lengths = [(1, 40), (most, 7)]
    step = Attention(random.Random(0), torch.float32, lengths, 16, 1, 2, 16)
    num_real = len(step.q)
    q = on_device(torch.cat((step.q, torch.full((sum(queries), *step.q.shape[1:]), 3.0))))
    tables = torch.cat((step.block_tables, torch.full_like(step.block_tables, 2**30)))
    inputs = inputs_of([*lengths, *((n, 0) for n in queries)], tables, DEVICE)
    inputs = dataclasses.replace(inputs, decodes=Decodes(4, len(q), most))
    cache = each_tensor(step.cache, on_device)
    planned = OPS.attention.plan(inputs, cache.spec)
    poison_allocations(DEVICE)
    out = OPS.attention.attend(q, cache, planned, step.scale).cpu()
    expected = reference.attention.attend(
        step.q, step.cache, inputs_of(lengths, step.block_tables), step.scale
    )
    assert_close(out[:num_real], expected)
    assert out[num_real:].eq(0).all()


@pytest.mark.parametrize("window", [None, 30])
def test_attention_with_capped_scores(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [(1, 300), (1, 9), (20, 60)]
    step = Attention(
        random.Random(0), torch.float32, lengths, 16, 2, 2, 16, window, DEVICE, softcap=2.0
    )
    step.q *= 5.0  # scores well beyond the cap
    step.check(OPS)


def test_attention_with_extreme_scores() -> None:
    torch.manual_seed(0)
    lengths = [(1, 100), (60, 100)]
    step = Attention(random.Random(0), torch.float32, lengths, 64, 2, 2, 32, device=DEVICE)
    step.q *= 30.0  # weights of 1 and 0
    step.check(OPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_over_a_cache_of_8_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = [(1, 150), (1, 9), (20, 60)]
    Attention(random.Random(0), dtype, lengths, 64, 2, 2, 16, device=DEVICE, cache_dtype=FP8).check(
        OPS
    )


# --- The same by every bit --------------------------------------------------------------------

DETERMINISTIC = triton_ops(num_processors=2, deterministic=True)


@pytest.mark.parametrize("window", [None, 50])
def test_deterministic_attention_depends_on_the_context_alone(window: int | None) -> None:
    """What a token gets as part of a prompt, in chunks of it, and when it is decoded."""
    torch.manual_seed(0)
    length, block_size = 150, 16
    step = Attention(
        random.Random(0), torch.bfloat16, [(length, length)] * 2, 16, 1, 2, block_size,
        device=DEVICE,
    )  # fmt: skip
    cache = each_tensor(step.cache, on_device)

    def attend(chunks: list[tuple[int, int, int]]) -> list[Tensor]:
        """Of (request, first token, end) each; those with one token come first."""
        lengths = [(end - first, end) for _, first, end in chunks]
        tables = step.block_tables[[request for request, _, _ in chunks]]
        inputs = inputs_of(lengths, tables, DEVICE)
        q = torch.cat([step.q[r * length + first : r * length + end] for r, first, end in chunks])
        planned = DETERMINISTIC.attention.plan(inputs, cache.spec)
        out = DETERMINISTIC.attention.attend(on_device(q), cache, planned, step.scale, window)
        return list(out.cpu().split([queries for queries, _ in lengths]))

    whole, other = attend([(0, 0, length), (1, 0, length)])
    assert attend([(0, 0, length)])[0].equal(whole)
    decoded, chunk, second = attend([(1, 149, 150), (0, 0, 70), (0, 70, 131)])
    assert decoded.equal(other[149:])
    assert torch.cat((chunk, second)).equal(whole[:131])
    for position in (0, 63, 100):
        ours, _ = attend([(0, position, position + 1), (1, 3, 4)])
        assert ours.equal(whole[position : position + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_products(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(70, 100), torch.randn(40, 100), torch.randn(40)
    x, weight, bias = (on_device(each.to(dtype)) for each in (x, weight, bias))
    for own_bias in (bias, None):
        linear = DETERMINISTIC.pack_linear(weight, own_bias, None)
        whole = linear(x)
        expected = x.float() @ weight.float().T + (0 if own_bias is None else own_bias.float())
        assert_close(whole.cpu(), expected.to(dtype).cpu())
        for rows in (slice(3, 4), slice(30, 70), slice(0, 0)):
            assert linear(x[rows]).equal(whole[rows])


# --- Weights of fewer bits --------------------------------------------------------------------


def test_products_with_weights_of_4_bits() -> None:
    """As of the weights that the reference rounds to, with activations as they are."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    weight, bias = torch.randn(70, 192).to(dtype), torch.randn(70).to(dtype)
    exact = quantize_int4(weight).values()
    for rows, own_bias in ((17, None), (1, bias)):
        x = torch.randn(rows, 192).to(dtype)
        moved = None if own_bias is None else on_device(own_bias)
        linear = OPS.pack_linear(on_device(weight), moved, "int4")
        assert linear(on_device(x[:0])).shape == (0, 70)
        expected = x.float() @ exact.T + (0 if own_bias is None else own_bias.float())
        assert_close(linear(on_device(x)).cpu(), expected.to(dtype))
    with pytest.raises(ValueError, match="int4' needs inputs in multiples of 64, not 32"):
        OPS.pack_linear(on_device(weight[:, :32]), None, "int4")


@pytest.mark.parametrize("kind", grouped.KINDS)
def test_products_with_weights_as_they_are_stored(kind: grouped.Kind) -> None:
    """As of their values, of which none is rounded; and tables of them."""
    assert OPS.pack_stored is not None
    torch.manual_seed(0)
    dtype = DTYPES[grouped.KINDS.index(kind) % len(DTYPES)]
    first, second = (grouped.random_weight(kind, n, 256) for n in (40, 9))
    stored = [weight.stored().to(DEVICE) for weight in (first, second)]
    exact = torch.cat([first.values(), second.values()])
    table = OPS.pack_stored(stored, None)
    assert isinstance(table, Table)
    ids = torch.tensor([48, 0, 39, 40, 39])
    assert table.rows(on_device(ids), dtype).cpu().equal(exact[ids].to(dtype))
    for rows, bias in ((1, None), (17, torch.randn(49).to(dtype)), (0, None)):
        x = torch.randn(rows, 512).to(dtype)[:, :256]
        linear = OPS.pack_stored(stored, None if bias is None else on_device(bias))
        expected = x.float() @ exact.T + (0 if bias is None else bias.float())
        assert linear is not None
        assert_close(linear(on_device(x)).cpu(), expected.to(dtype))


def test_products_with_weights_of_several_layouts_side_by_side() -> None:
    weights = [grouped.random_weight(kind, 9, 256) for kind in grouped.KINDS[:2]]
    plain, bias, x = torch.randn(7, 256), torch.randn(25), torch.randn(3, 256)
    parts = [*(weight.stored().to(DEVICE) for weight in weights), on_device(plain)]
    assert OPS.pack_stored is not None
    linear = OPS.pack_stored(parts, on_device(bias))
    assert linear is not None
    exact = torch.cat([*(weight.values() for weight in weights), plain])
    assert_close(linear(on_device(x)).cpu(), x @ exact.T + bias)
    # An odd number of groups of 32 is dequantized; the deterministic product takes values alone.
    odd = grouped.random_weight(grouped.KINDS[0], 9, 96)
    assert OPS.pack_stored([odd.stored().to(DEVICE)], None) is None
    assert DETERMINISTIC.pack_stored is None


def test_products_with_weights_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies, on a GPU; the rounding of rows is ours."""

    def multiply(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        assert a.dtype == b.dtype == FP8 and a.is_contiguous() and b.t().is_contiguous()
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch, "_scaled_mm", multiply)
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 1008).bfloat16(), torch.randn(48).bfloat16()
    for own_bias in (None, bias):
        moved = None if own_bias is None else on_device(own_bias)
        linear = OPS.pack_linear(on_device(weight), moved, "fp8")
        for rows in (0, 1, 19):
            x = (torch.randn(rows, 1008) * torch.rand(rows, 1) * 100).bfloat16()
            expected = REFERENCE.pack_linear(weight, own_bias, "fp8")(x)
            torch.testing.assert_close(linear(on_device(x)).cpu(), expected, rtol=0.02, atol=0.5)
            assert torch.equal(linear(round_rows(on_device(x))), linear(on_device(x)))
    # What the library does not multiply stays as it is.
    odd = OPS.pack_linear(on_device(weight[:5]), None, "fp8")(on_device(weight))
    assert_close(odd.cpu(), weight @ weight[:5].T)


# --- Between the projections ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 80, 1000, 1024])
def test_norms_and_activation(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    for rows in (0, 1, 3):
        x, residual = torch.randn(2, rows, size).to(dtype)
        weight = torch.randn(size).to(dtype)
        gate_up = torch.randn(rows, 2 * size).to(dtype) * 8
        poison_allocations(DEVICE)
        got = OPS.rms_norm(on_device(x), on_device(weight), 1e-6)
        assert_close(got.cpu(), reference.rms_norm(x, weight, 1e-6))
        pair = OPS.add_rms_norm(on_device(x), on_device(residual), on_device(weight), 1e-6)
        for got, expected in zip(
            pair, reference.add_rms_norm(x, residual, weight, 1e-6), strict=True
        ):
            assert_close(got.cpu(), expected)
        for name in ("silu_and_mul", "gelu_and_mul"):
            actual = getattr(OPS, name)(on_device(gate_up)).cpu()
            assert_close(actual, getattr(reference, name)(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_activations_round_as_a_kernel_of_its_own_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rounding = OPS.rounding
    assert rounding is not None
    for rows, size in ((0, 80), (1, 1000), (3, 1024), (2, 3000)):
        x, residual = on_device(torch.randn(2, rows, size).to(dtype) * 30)
        weight = on_device(torch.randn(size).to(dtype))
        gate_up = on_device(torch.randn(rows, 2 * size).to(dtype) * 8)
        gate_up[1:2] = 0
        normed, total = OPS.add_rms_norm(x, residual, weight, 1e-6)
        poison_allocations(DEVICE)
        rounded, same_total = rounding.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(same_total, total)
        for got, exact in (
            (rounded, normed),
            (rounding.silu_and_mul(gate_up), OPS.silu_and_mul(gate_up)),
            (rounding.gelu_and_mul(gate_up), OPS.gelu_and_mul(gate_up)),
        ):
            assert isinstance(got, Rounded) and got.dtype == dtype
            values, scales = quantize_fp8(exact.cpu())
            assert_close(got.scales.cpu()[:, 0], scales)
            back = got.values.cpu().float() * got.scales.cpu()
            expected = values.float() * scales[:, None]
            if DEVICE.type == "cpu":
                assert torch.equal(back, expected)
            torch.testing.assert_close(back, expected, rtol=0.13, atol=0.01)
    # A row that is too long for one program is left to the product.
    assert isinstance(rounding.silu_and_mul(on_device(torch.zeros(1, 2 << 16))), Tensor)


def test_norm_of_strided_rows() -> None:
    x, weight = torch.randn(6, 5, 64)[:, :3], torch.randn(64)
    got = OPS.rms_norm(on_device(x), on_device(weight), 1e-6)
    assert_close(got.cpu(), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [None, FP8], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("normed", [True, False], ids=["with norms", "without"])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_norm_rotary_store(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, normed: bool, head_dim: int
) -> None:
    torch.manual_seed(head_dim)
    heads, kv_heads, block_size = 5, 2, 7
    cache_dtype = cache_dtype or dtype
    for tokens in (0, 1, 19):
        # Large enough for some values to leave the range of 8 bits.
        qkv = (torch.randn(tokens, (heads + 2 * kv_heads) * head_dim) * 200).to(dtype)
        norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype))
        positions = torch.randint(0, 9_000, (tokens,))
        positions[:1] = 8_999
        angles = torch.outer(torch.arange(9_000.0), torch.rand(head_dim // 2))
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        slots = torch.randperm(10 * block_size)[:tokens]
        results = []
        for ops, device in ((OPS, DEVICE), (REFERENCE, torch.device("cpu"))):
            cache = poisoned_cache(10, PagedKV(block_size, kv_heads, head_dim, cache_dtype), device)
            arguments = [tensor.to(device) for tensor in (positions, cos_sin)]
            weights = tuple(norm.to(device) for norm in norms) if normed else None
            poison_allocations(device)
            q = ops.norm_rotary_store(
                qkv.to(device), weights, 1e-6, *arguments, cache, slots.to(device)
            )
            results.append([part.cpu().float() for part in (q, *cache.tensors)])
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, FP8: 0.13}
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            rounding = tolerance[dtype if i == 0 else cache_dtype]
            torch.testing.assert_close(
                actual, expected, rtol=rounding, atol=rounding, equal_nan=True
            )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "step by step"])
def test_what_pads_a_step_is_stored_nowhere(fused: bool) -> None:
    cache = poisoned_cache(2, PagedKV(4, 1, 16, torch.float32), DEVICE)
    qkv = torch.ones(3, 3 * 16, device=DEVICE)
    slots = torch.tensor([-1, 5, -1], device=DEVICE)
    positions, cos_sin = torch.zeros(3, dtype=torch.int64), torch.ones(1, 16)
    ops = OPS if fused else dataclasses.replace(OPS, fused_norm_rotary_store=None)
    ops.norm_rotary_store(qkv, None, 1e-6, on_device(positions), on_device(cos_sin), cache, slots)
    for part in cache.tensors:
        assert part[1, 0, 1].isfinite().all() and part.isfinite().sum() == 16


# --- The step's inputs ------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 7])
@pytest.mark.parametrize(
    "chunks",  # (row, start, tokens); row -1 is padding
    [
        [(3, 0, 1)],
        [(0, 5, 1), (2, 90, 1), (1, 0, 1)],
        [(1, 41, 1), (-1, 0, 1), (0, 15, 1), (-1, 0, 1)],
        [(2, 99, 1), (0, 0, 300), (3, 16, 33)],
    ],
)
def test_prepare_step(chunks: list[tuple[int, int, int]], block_size: int) -> None:
    torch.manual_seed(0)
    token_table = torch.randint(0, 10**6, (4, 400))
    # Slots beyond 32 bits, in two groups of layers.
    block_tables = torch.randint(0, 2**24, (2, 4, 60), dtype=torch.int32)
    rows, starts, lengths = (torch.tensor(part) for part in zip(*chunks, strict=True))
    query_starts = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    sizes = int(query_starts[-1]), Decodes.of(lengths.tolist()), int(lengths.max())
    step = StepRows(rows.int(), starts.int(), query_starts, *sizes)
    expected = reference.prepare_step(step, token_table, block_tables, block_size)
    moved = StepRows(*map(on_device, (step.rows, step.starts, query_starts)), *sizes)
    tables = on_device(token_table), on_device(block_tables)
    assert_same_inputs(OPS.prepare_step(moved, *tables, block_size), expected, block_size)


# --- Logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 30, 1500])
def test_penalties(length: int) -> None:
    torch.manual_seed(length)
    rows, vocab = 4, 333
    logits = torch.randn(rows, vocab) * 4
    logits[:, 7] = -torch.inf
    token_ids = torch.randint(0, vocab, (rows, length))
    token_ids[:, length // 2 :] = token_ids[:, : length - length // 2].clone()  # twice each
    num_tokens = torch.tensor([1, length, max(length - 5, 1), max(length // 2, 1)])
    for row, count in enumerate(num_tokens.tolist()):
        token_ids[row, count:] = 2**40  # nobody may follow these
    counts = torch.randint(0, 3, (rows, vocab)).int().gather(1, token_ids.clamp(max=vocab - 1))
    penalties = torch.rand(3, rows) + torch.tensor([[0.5], [-0.5], [-0.5]])
    expected, actual = logits.clone(), on_device(logits)
    reference.penalize(expected, token_ids, num_tokens, counts, *penalties)
    moved = (on_device(tensor) for tensor in (token_ids, num_tokens, counts, *penalties))
    OPS.sampling.penalize(actual, *moved)
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("vocab", [1, 32, 100, 3000])
def test_bitmask(vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(5, vocab + 3)[:, :vocab]
    mask = torch.randint(-(2**31), 2**31, (5, -(-vocab // 32))).int()
    mask[0], mask[1] = -1, 0
    expected, actual = logits.clone(), on_device(logits)
    reference.apply_bitmask(expected, mask)
    OPS.sampling.apply_bitmask(actual, on_device(mask))
    assert actual.cpu().equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(4, 6000) * 5).to(dtype)
    logits[1, 3:] = -torch.inf
    token_ids = torch.tensor([5, 2, 5999, int(logits[3].argmax())])
    expected = reference.top_logprobs(logits, token_ids, 2)
    actual = OPS.sampling.top_logprobs(on_device(logits), on_device(token_ids), 2)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted)
    alone = OPS.sampling.top_logprobs(on_device(logits[2:3]), on_device(token_ids[2:3]), 2)
    assert alone[1].equal(actual[1][2:3]), "it depends on the other rows"
    none = OPS.sampling.top_logprobs(on_device(logits[:0]), on_device(token_ids[:0]), 2)
    assert [part.shape for part in none] == [(0, 3), (0, 3), (0,)]


# --- Sampling ---------------------------------------------------------------------------------


sample = sampling_on(DEVICE, OPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 257, 8500])
def test_same_tokens_as_the_reference(dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(vocab)
    rows = 30 if vocab < 1000 else 10
    logits = (torch.randn(rows, vocab) * torch.rand(rows, 1) * 6).to(dtype)
    assert_same_draws(sample, logits, params(rows, vocab))


@pytest.mark.parametrize("only", ["none", "top_k", "top_p", "min_p"])
def test_each_filter_alone(only: str) -> None:
    torch.manual_seed(1)
    fixed: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    fixed.pop(only, None)
    assert_same_draws(sample, torch.randn(30, 3000) * 2, params(30, 5, **fixed))


def test_full_vocabulary() -> None:
    torch.manual_seed(1)
    logits = (torch.randn(3, 151_936) * 2).bfloat16()
    assert_same_draws(sample, logits, params(3, 5))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter can be watched")
@pytest.mark.parametrize(
    "sampling, most",
    [
        (dict(temperature=0), 1),
        (dict(temperature=0.6, top_k=20, top_p=0.95, min_p=0), 2),
        (dict(temperature=0.6, top_k=0, top_p=0.95, min_p=0), 2),
        (dict(temperature=1, top_k=0, top_p=1, min_p=0), 3),
        (dict(temperature=5, top_k=0, top_p=0.999, min_p=0), 20),  # nearly all tokens are in
    ],
)
def test_passes_over_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, sampling: dict[str, float], most: int
) -> None:
    """The logits of a row are read no more often than that, and the tokens are the same."""
    from triton.runtime.interpreter import InterpreterBuilder

    torch.manual_seed(1)
    logits = (torch.randn(3, 20_000) * 3).bfloat16()
    read = []
    load = InterpreterBuilder.create_masked_load

    def count(self: Any, pointers: Any, *rest: Any) -> Any:
        if pointers.data.size == 8192:
            read.append(8192)
        return load(self, pointers, *rest)

    values = params(3, 5, **sampling)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", count)
    sample(logits, **values)
    blocks = 3 * -(-logits.shape[1] // 8192)
    assert len(read) <= most * blocks
    monkeypatch.undo()
    assert_same_draws(sample, logits, values)


def test_more_candidates_than_can_be_put_aside() -> None:
    """Thousands of tokens that are as likely: the cuts are searched for over the whole row."""
    logits = torch.zeros(5, 1500)
    logits[:, 7] = 1.0
    for cuts in (dict(top_k=5, top_p=1), dict(top_k=0, top_p=0.4), dict(top_k=1400, top_p=0.5)):
        values = params(5, temperature=1, min_p=0, **cuts)
        assert_same_draws(sample, logits, values)


def test_greedy() -> None:
    logits = torch.randn(8, 9000).bfloat16()  # with ties: the first of the highest wins
    assert sample(logits, **params(8, temperature=0)).equal(logits.float().argmax(-1))


def test_ties_are_cut_by_token_id() -> None:
    logits = torch.zeros(24, 100)
    tokens = sample(logits, **params(24, temperature=1, top_k=3, top_p=1, min_p=0))
    assert set(tokens.tolist()) == set(range(3))
    tokens = sample(logits, **params(24, temperature=1, top_k=0, top_p=3.5 / 100, min_p=0))
    assert set(tokens.tolist()) == set(range(4))
    tokens = sample(logits, **params(24, temperature=1, top_k=8, top_p=0.31, min_p=0))
    assert set(tokens.tolist()) == set(range(3))


def test_top_k_of_several_that_are_equal() -> None:
    """2, 1, 1, 1, 0: two and one of the ones; then the ones together, which makes four exactly."""
    logits = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0]).expand(24, -1).contiguous()
    off = dict(temperature=1, top_p=1, min_p=0)
    assert set(sample(logits, **params(24, top_k=2, **off)).tolist()) == {0, 2}
    assert set(sample(logits, **params(24, top_k=4, **off)).tolist()) == {0, 2, 3, 4}


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.full((20, 600), -torch.inf)
    logits[:, [3, 300, 599]] = torch.tensor([1.0, 2.0, 0.5])
    assert set(sample(logits, **params(20)).tolist()) <= {3, 300, 599}


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-44])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(8, 1000) * 10
    assert sample(logits, **params(8, temperature=temperature)).equal(logits.argmax(-1))


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_logits_that_are_no_numbers(share: float) -> None:
    assert_some_token_is_drawn(sample, share, torch.bfloat16, rows=12)


def test_strided_logits() -> None:
    logits, values = on_device(torch.randn(10, 1001)), params(10)
    whole = sample(logits[:, :1000].contiguous(), **values)
    assert sample(logits[:, :1000], **values).equal(whole)
