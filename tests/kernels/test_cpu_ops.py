"""The C++ ops against their oracles in plain torch, over random shapes."""

import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import Ops, reference, select_ops
from kernels.cpu import build
from kernels.cpu.compiler import LEVELS
from kernels.ops import REFERENCE
from kernels.quantization import Quantization, linear_grouped
from kernels.types import NO_DECODES, PagedKV, StepRows, Table
from tests.kernels import grouped
from tests.kernels.levels import stub_compiler
from tests.kernels.steps import (
    TOLERANCE,
    Attention,
    assert_close,
    assert_same_inputs,
    poison_allocations,
    random_lengths,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_attention_random(ops: Ops, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lengths = random_lengths(rng)
    window = rng.choice([None, None, 1, 24, rng.randint(1, 200)])
    Attention(
        rng,
        dtype,
        lengths,
        head_dim=rng.choice([16, 32, 64, 80, 96, 128, 256]),
        kv_heads=rng.choice([1, 2, 3, 8]),
        group=rng.choice([1, 2, 3, 4, 5, 7, 8]),
        block_size=rng.choice([1, 7, 16, 32, 64, 256]),
        window=window,
        softcap=rng.choice([None, None, 1.5, 50.0]),
        has_sinks=rng.random() < 0.3,
    ).check(ops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_attention_over_an_fp8_cache(ops: Ops, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    Attention(
        rng,
        dtype,
        random_lengths(rng),
        head_dim=rng.choice([16, 64, 80, 128]),
        kv_heads=rng.choice([1, 2, 3]),
        group=rng.choice([1, 2, 3, 5]),
        block_size=rng.choice([1, 7, 16, 32]),
        window=rng.choice([None, 24]),
        cache_dtype=FP8,
    ).check(ops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 700])
def test_attention_long_context(ops: Ops, dtype: torch.dtype, queries: int) -> None:
    # Few heads and one request: the context is split over work items.
    torch.manual_seed(0)
    lengths = [(queries, 5003), (1, 9)]
    Attention(random.Random(0), dtype, lengths, 64, 1, 4, 32, softcap=3.0, has_sinks=True).check(
        ops
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_head_dim_without_a_kernel(ops: Ops, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Attention(random.Random(0), dtype, [(3, 10), (1, 40)], 24, 2, 2, 16).check(ops)


def test_attention_with_extreme_scores(ops: Ops) -> None:
    torch.manual_seed(0)
    step = Attention(random.Random(0), torch.float32, [(1, 100), (60, 100)], 64, 2, 2, 32)
    step.q *= 30.0  # weights of 1 and 0
    step.check(ops)
    for sink in (-1e4, 1e4):  # no weight for sinks, and for nothing else
        step.sinks = torch.full((4,), sink)
        step.check(ops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 16, 33, 64, 80, 1000, 1024])
def test_norms_and_activation(ops: Ops, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    for rows in (1, 3, 40):
        x, residual, weight = torch.randn(3, rows, size).to(dtype).unbind()
        weight = weight[0].contiguous()
        poison_allocations()
        assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
        actual = ops.add_rms_norm(x, residual, weight, 1e-6)
        for got, wanted in zip(
            actual, reference.add_rms_norm(x, residual, weight, 1e-6), strict=True
        ):
            assert_close(got, wanted)
        gate_up = torch.randn(rows, 2 * size).to(dtype) * 8
        assert_close(ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))
        assert_close(ops.gelu_and_mul(gate_up), reference.gelu_and_mul(gate_up))


def test_norm_of_strided_rows(ops: Ops) -> None:
    x = torch.randn(6, 5, 64)[:, :3]
    weight = torch.randn(64)
    assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("seed", range(5))
def test_prepare_step(ops: Ops, seed: int) -> None:
    """Rows in any order, some of them padding, and block tables wider than what is used."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    block_size, max_blocks = rng.choice([1, 7, 16]), rng.randint(30, 40)
    token_table = torch.randint(1000, (9, max_blocks * block_size))
    block_tables = torch.randint(100, (2, 9, max_blocks)).int()  # of two groups of layers
    rows = torch.tensor([*rng.sample(range(9), 5), -1]).int()
    starts = torch.tensor([rng.randint(0, 9) for _ in rows]).int()
    lengths = [rng.choice([1, 1, 2, 20]) for _ in rows]
    query_starts = torch.tensor([0, *lengths]).cumsum(0).int()
    step = StepRows(rows, starts, query_starts, sum(lengths), NO_DECODES, max(lengths))
    arguments = step, token_table, block_tables, block_size
    poison_allocations()
    actual, expected = ops.prepare_step(*arguments), reference.prepare_step(*arguments)
    assert_same_inputs(actual, expected, block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, size", [(1, 8), (7, 100), (300, 1024)])
def test_embed(ops: Ops, dtype: torch.dtype, tokens: int, size: int) -> None:
    weight, ids = torch.randn(50, size).to(dtype), torch.randint(50, (tokens,))
    assert torch.equal(ops.embed(ids, weight), reference.embed(ids, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "step by step"])
def test_norm_rotary_store(
    ops: Ops, dtype: torch.dtype, head_dim: int, normed: bool, fused: bool
) -> None:
    if not fused:
        ops = replace(ops, fused_norm_rotary_store=None)
    torch.manual_seed(head_dim)
    heads, kv_heads, block_size = 6, 2, 7
    for tokens in (1, 19):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
        norms = None
        if normed:
            norms = torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)
        positions = torch.randint(0, 9_000, (tokens,))
        positions[0] = 8_999
        angles = torch.outer(torch.arange(9_000.0), torch.rand(head_dim // 2))
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        slots = torch.randperm(10 * block_size)[:tokens]
        results = []
        for table in (ops, REFERENCE):
            spec = PagedKV(block_size, kv_heads, head_dim, dtype)
            cache = table.attention.new_cache(10, spec, torch.device("cpu"))
            for part in cache.tensors:
                part.zero_()
            q = table.norm_rotary_store(qkv, norms, 1e-6, positions, cos_sin, cache, slots)
            results.append((q, *cache.tensors))
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_is_stored_in_fp8_as_torch_rounds_it(ops: Ops, dtype: torch.dtype) -> None:
    """All 16-bit floats as values of a cache; keys go the same way after their rotation."""
    kv_heads, head_dim, block_size = 2, 64, 16
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, kv_heads, head_dim)
    values = values.nan_to_num(0.0, float("inf"), float("-inf"))
    tokens = len(values)
    qkv = torch.cat((torch.randn(tokens, 2 * kv_heads, head_dim).to(dtype), values), 1).flatten(1)
    slots = torch.arange(tokens)
    slots[::7] = -1  # nowhere
    at, cos_sin = (
        torch.zeros(tokens, dtype=torch.int64),
        torch.cat((torch.ones(32), torch.zeros(32))),
    )
    caches = []
    unfused = replace(ops, fused_norm_rotary_store=None)
    for table in (ops, unfused, REFERENCE):
        spec = PagedKV(block_size, kv_heads, head_dim, FP8)
        cache = table.attention.new_cache(-(-tokens // block_size), spec, torch.device("cpu"))
        for part in cache.tensors:
            part.view(torch.uint8).fill_(1)
        table.norm_rotary_store(qkv, None, 1e-6, at, cos_sin[None], cache, slots)
        caches.append([part.view(torch.uint8) for part in cache.tensors])
    for actual, step_by_step, expected in zip(*caches, strict=True):
        assert torch.equal(actual, expected) and torch.equal(step_by_step, expected)


@pytest.mark.parametrize("quantization", [None, "w8a8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_linear(ops: Ops, dtype: torch.dtype, quantization: Quantization | None) -> None:
    rng = random.Random(0)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 97, 200):
        inputs, outputs = 32 * rng.randint(1, 6), rng.randint(1, 200)
        if rows == 13:
            inputs = 3072  # a panel in more than one block
        check_linear(ops, dtype, quantization, rows, inputs, outputs)


def check_linear(
    ops: Ops,
    dtype: torch.dtype,
    quantization: Quantization | None,
    rows: int,
    inputs: int,
    outputs: int,
) -> None:
    torch.manual_seed(rows)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype) if rows % 2 else None
    x = torch.randn(rows, 2 * inputs).to(dtype)[:, :inputs]
    poison_allocations()
    actual = ops.pack_linear(weight, bias, quantization)(x)
    exact = None if bias is None else bias.float()
    oracle = reference.pack_linear(weight.float(), exact, quantization)
    tolerance = max(TOLERANCE[dtype], 0.01 if quantization else 0)  # halves round either way
    torch.testing.assert_close(actual.float(), oracle(x.float()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_as_they_are_stored(ops: Ops, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    for kind in grouped.KINDS:
        for rows in (1, 3, 6, 7, 97):
            check_grouped(ops, dtype, kind, rows, inputs=rng.choice([256, 768]), outputs=70)


def check_grouped(
    ops: Ops, dtype: torch.dtype, kind: grouped.Kind, rows: int, inputs: int, outputs: int
) -> None:
    """Maps of two layouts and of values side by side, the first of two parts."""
    assert ops.pack_stored is not None
    torch.manual_seed(rows)
    weights = [grouped.random_weight(kind, n, inputs) for n in (outputs, 5)]
    other = grouped.random_weight(grouped.KINDS[0], 9, inputs)
    plain = (torch.randn(7, inputs) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs + 21).to(dtype) if rows % 2 else None
    x = torch.randn(rows, 2 * inputs).to(dtype)[:, :inputs]
    poison_allocations()
    linear = ops.pack_stored([*(w.stored() for w in (*weights, other)), plain], bias)
    assert linear is not None
    parts = [linear_grouped(x.float(), weight, None) for weight in (*weights, other)]
    expected = torch.cat([*parts, x.float() @ plain.float().T], 1)
    expected = expected if bias is None else expected + bias.float()
    tolerance = max(TOLERANCE[dtype], 0.02)  # halves round either way
    torch.testing.assert_close(linear(x).float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_a_table_of_its_rows(ops: Ops, dtype: torch.dtype) -> None:
    """So an embedding need not be there beside the head that it is tied to."""
    torch.manual_seed(0)
    ids = torch.tensor([69, 0, 17, 16, 33, 17])
    plain = torch.randn(70, 96).to(dtype)
    linear = ops.pack_linear(plain, None, None)
    assert isinstance(linear, Table) and torch.equal(linear.rows(ids, dtype), plain[ids])
    for kind in grouped.KINDS:
        weight = grouped.random_weight(kind, 70, 768)
        assert ops.pack_stored is not None
        linear = ops.pack_stored([weight.stored()], None)
        assert isinstance(linear, Table)
        expected = weight.values()[ids].to(dtype).float()
        torch.testing.assert_close(
            linear.rows(ids, dtype).float(), expected, rtol=TOLERANCE[dtype], atol=1e-6
        )


def test_what_is_rounded_when_it_is_packed_is_no_table(ops: Ops) -> None:
    for quantization in ("w8a8", "int4"):
        assert not isinstance(ops.pack_linear(torch.randn(5, 64), None, quantization), Table)


@pytest.mark.parametrize("quantization", ["w8a8", "int4"])
def test_quantized_zeros(ops: Ops, quantization: Quantization) -> None:
    zeros = torch.zeros(3, 64)
    assert torch.equal(ops.pack_linear(torch.randn(5, 64), None, quantization)(zeros), zeros[:, :5])
    assert torch.equal(ops.pack_linear(zeros, None, quantization)(torch.ones(1, 64)), zeros[:1, :3])


def test_unknown_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="MANTA_CPU_ISA: 'avx1024' is unknown; choose from"):
        build.choose_level()


def test_a_level_the_cpu_lacks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_CPU_ISA", "avx512")
    monkeypatch.setattr(build, "levels", lambda: LEVELS["x86_64"])
    monkeypatch.setattr(build, "cpu_features", lambda: {"avx2", "fma", "f16c"})
    assert build.choose_level().name == "avx2"


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert select_ops(torch.device("cpu")).name == "cpu-torch"
            assert select_ops(torch.device("cpu")).name == "cpu-torch"
    finally:
        build.load_library.cache_clear()
    assert len(caplog.records) == 1
    assert "apt-get install g++" in caplog.text


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    stub_compiler(tmp_path, 'sleep 0.1; touch "$target"')
    code = "from kernels.cpu import build; print(build.build(build.choose_level()))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"MANTA_CACHE_DIR": str(tmp_path), "CXX": str(tmp_path / "g++")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs, errors = zip(*(process.communicate() for process in started), strict=True)
    assert {Path(output.strip()) for output in outputs} == set(tmp_path.glob("*.so"))
    assert len(set(outputs)) == 1 and "".join(errors).count("Building CPU kernels") == 1
    assert (tmp_path / "commands").read_text().count("-shared") == 1
