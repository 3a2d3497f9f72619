"""The ops of a GPU at the sizes of real models, and recorded as CUDA graphs."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from kernels import AttentionNeeds, Ops, reference, select_ops
from kernels.ops import REFERENCE
from kernels.types import Decodes, KVCache, PagedKV, SamplingTable, StepRows
from tests.gpu.device import DEVICE, ON_GPU, OPS, needs_gpu, record
from tests.kernels.steps import Attention, assert_close, each_tensor, sampling_on
from tests.kernels.test_cpu_sampling import assert_same_draws, params

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
# (query heads, key/value heads, head dimension)
MODELS = {
    "qwen3-0.6b": (16, 8, 128),
    "qwen3-8b": (32, 8, 128),
    "llama-3.2-1b": (32, 8, 64),
    "phi-2": (32, 32, 80),
    "phi-3": (32, 32, 96),
    "gemma-2": (8, 4, 256),
}


def lengths_of_a_step(rng: random.Random, decodes: int, prompts: int) -> list[tuple[int, int]]:
    """(queries, context): decodes, then chunks of prompts; short ones in a rehearsal."""
    longest = 5000 if ON_GPU else 60
    lengths = [(1, rng.choice([1, 127, 128, 129, rng.randint(1, longest)])) for _ in range(decodes)]
    for _ in range(prompts):
        context = rng.randint(2, longest)
        lengths.append((rng.randint(1, min(context, longest // 4)), context))
    return lengths


@pytest.mark.parametrize("block_size", [16, 32, 128, 256])
@pytest.mark.parametrize("model", MODELS)
def test_attention(model: str, block_size: int) -> None:
    if not ON_GPU and (model, block_size) not in {("qwen3-0.6b", 32), ("phi-2", 16)}:
        pytest.skip("a rehearsal runs two of these")
    rng = random.Random(block_size)
    torch.manual_seed(block_size)
    heads, kv_heads, head_dim = MODELS[model]
    if not ON_GPU:
        heads, kv_heads = heads // kv_heads, 1
    lengths = lengths_of_a_step(rng, 40 if ON_GPU else 2, 4 if ON_GPU else 1)
    window = rng.choice([None, 1000])
    softcap = 50.0 if model == "gemma-2" else None
    Attention(
        rng, BF16, lengths, head_dim, kv_heads, heads // kv_heads, block_size, window, DEVICE,
        softcap=softcap,
    ).check(OPS)  # fmt: skip


def test_attention_over_a_cache_of_8_bits() -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    lengths = lengths_of_a_step(rng, 20 if ON_GPU else 2, 3 if ON_GPU else 1)
    Attention(rng, BF16, lengths, 128, 8 if ON_GPU else 1, 2, 64, None, DEVICE, FP8).check(OPS)


@needs_gpu
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("block_size", [32, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("backend", ["flash-attn-2", "flash-attn-4"])
def test_flash_attention(backend: Any, head_dim: int, block_size: int, window: int | None) -> None:
    needs = AttentionNeeds(backend, BF16, BF16, head_dim, block_size)
    try:
        ops = select_ops(DEVICE, needs)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    rng = random.Random(head_dim)
    lengths = lengths_of_a_step(rng, 20, 5)
    step = Attention(rng, BF16, lengths, head_dim, 8, 2, block_size, window, DEVICE)
    # Unlike ours, its kernels need what no key or value belongs in to be finite.
    step.cache = each_tensor(step.cache, lambda tensor: tensor.nan_to_num(0))
    step.block_tables.clamp_(max=len(step.cache.keys) - 1)
    step.check(ops)


@pytest.mark.parametrize("only", ["none", "top_k", "top_p", "min_p", "all"])
def test_sampling_over_a_full_vocabulary(only: str) -> None:
    torch.manual_seed(1)
    rows = 256 if ON_GPU else 2
    logits = (torch.randn(rows, 151_936 if ON_GPU else 20_000) * 2).bfloat16()
    fixed: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    fixed = {} if only == "all" else {k: v for k, v in fixed.items() if k != only}
    values = params(rows, 5, **fixed)
    assert_same_draws(sampling_on(DEVICE, OPS), logits, values)


@pytest.mark.parametrize("size", [1024, 4096, 5120])
def test_norms_and_activation(size: int) -> None:
    torch.manual_seed(size)
    rows = 500 if ON_GPU else 3
    x, other = torch.randn(2, rows, size).to(BF16)
    weight, gate_up = torch.randn(size).to(BF16), torch.randn(rows, 2 * size).to(BF16) * 4
    on_gpu = [tensor.to(DEVICE) for tensor in (x, other, weight, gate_up)]
    expected = reference.add_rms_norm(x, other, weight, 1e-6)
    for got, wanted in zip(OPS.add_rms_norm(*on_gpu[:3], 1e-6), expected, strict=True):
        assert_close(got.cpu(), wanted)
    assert_close(OPS.silu_and_mul(on_gpu[3]).cpu(), reference.silu_and_mul(gate_up))


# --- A whole step, recorded -------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, VOCAB = 4, 2, 16, 16, 300


@dataclass
class DecodingStep:
    """One layer's worth of every op, for a batch of B rows that decode, some of them padding."""

    rows: Tensor  # [B] int32
    starts: Tensor  # [B] int32
    token_table: Tensor
    block_table: Tensor
    cache: KVCache
    weights: dict[str, Tensor]

    def run(self, ops: Ops) -> tuple[Tensor, Tensor]:
        """(what attention gives [B, H, D], sampled tokens [B])"""
        size, weights = len(self.rows), self.weights
        query_starts = torch.arange(size + 1, dtype=torch.int32, device=self.rows.device)
        step = StepRows(self.rows, self.starts, query_starts, size, Decodes(size, size), 1)
        tables = self.block_table.unsqueeze(0)
        inputs = ops.prepare_step(step, self.token_table, tables, BLOCK_SIZE)
        planned = ops.attention.plan(inputs.attention[0], self.cache.spec)
        x = weights["embedding"][inputs.token_ids]
        x, residual = ops.add_rms_norm(x, torch.zeros_like(x), weights["norm"], 1e-6)
        qkv = x @ weights["qkv"]
        norms = weights["q_norm"], weights["k_norm"]
        q = ops.norm_rotary_store(
            qkv, norms, 1e-6, inputs.positions, weights["cos_sin"], self.cache, planned.slots
        )
        attended = ops.attention.attend(q, self.cache, planned, 0.25)
        x = ops.silu_and_mul(attended.flatten(1) @ weights["gate_up"])
        logits = ops.rms_norm(x + residual[:, : x.shape[1]], weights["last"], 1e-6)
        logits = (logits @ weights["head"]).float()
        ops.sampling.apply_bitmask(logits, weights["mask"])
        one, numbers = torch.ones(size, device=logits.device), inputs.positions
        table = SamplingTable(one, torch.full_like(numbers, 20), one * 0.9, one * 0.01, numbers * 7)
        rows = torch.arange(size, device=logits.device)
        tokens = ops.sampling.sample(logits, table, rows, numbers)
        return attended, tokens

    def to(self, device: torch.device) -> "DecodingStep":
        return DecodingStep(
            self.rows.to(device),
            self.starts.to(device),
            self.token_table.to(device),
            self.block_table.to(device),
            each_tensor(self.cache, lambda tensor: tensor.to(device).clone()),
            {name: weight.to(device) for name, weight in self.weights.items()},
        )


def test_a_recorded_step_serves_all_lengths_and_padding() -> None:
    """Only the contents of its input buffers change, never a shape, a launch or the host."""
    torch.manual_seed(0)
    size, hidden, max_len = 6, HEADS * HEAD_DIM, 2000 if ON_GPU else 300
    blocks_each = -(-max_len // BLOCK_SIZE)
    qkv_size = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    angles = torch.outer(torch.arange(float(max_len)), torch.rand(HEAD_DIM // 2))
    weights = {
        "embedding": torch.randn(VOCAB, hidden),
        "norm": torch.rand(hidden) + 0.5,
        "qkv": torch.randn(hidden, qkv_size) * 0.1,
        "q_norm": torch.rand(HEAD_DIM) + 0.5,
        "k_norm": torch.rand(HEAD_DIM) + 0.5,
        "cos_sin": torch.cat((angles.cos(), angles.sin()), -1),
        "gate_up": torch.randn(hidden, 2 * 32) * 0.2,
        "last": torch.rand(32) + 0.5,
        "head": torch.randn(32, VOCAB),
        "mask": torch.randint(-(2**31), 2**31, (size, -(-VOCAB // 32))).int(),
    }
    spec = PagedKV(BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.float32)
    cache = reference.attention.new_cache(size * blocks_each, spec, torch.device("cpu"))
    oracle = DecodingStep(
        torch.full((size,), -1, dtype=torch.int32),
        torch.zeros(size, dtype=torch.int32),
        torch.randint(0, VOCAB, (size, max_len)),
        torch.randperm(size * blocks_each).int().view(size, blocks_each),
        each_tensor(cache, torch.randn_like),
        weights,
    )
    recorded = oracle.to(DEVICE)
    attended = torch.empty(size, HEADS, HEAD_DIM, device=DEVICE)
    tokens = torch.empty(size, dtype=torch.int64, device=DEVICE)

    def run() -> None:
        for buffer, result in zip((attended, tokens), recorded.run(OPS), strict=True):
            buffer.copy_(result)

    replay = record(run)  # with nothing but padding, which must leave no trace
    rng = random.Random(0)
    for num_rows in (size, 1, 4):
        rows = rng.sample(range(size), num_rows)
        starts = [rng.choice([0, 15, 16, 129, rng.randrange(max_len)]) for _ in rows]
        oracle.rows.fill_(-1)
        oracle.rows[:num_rows] = torch.tensor(rows)
        oracle.starts[:num_rows] = torch.tensor(starts)
        recorded.rows.copy_(oracle.rows)
        recorded.starts.copy_(oracle.starts)
        replay()
        expected_attended, expected_tokens = oracle.run(REFERENCE)
        torch.testing.assert_close(
            attended.cpu()[:num_rows], expected_attended[:num_rows], rtol=2e-5, atol=2e-5
        )
        assert tokens.cpu()[:num_rows].equal(expected_tokens[:num_rows])
    for got, expected in zip(recorded.cache.tensors, oracle.cache.tensors, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
