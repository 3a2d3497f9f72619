"""A token has the same bits however it is computed: alone, in a batch, in a piece of a prompt."""

import random

import pytest
import torch
from torch import Tensor

from kernels import Ops
from kernels.quantization import Quantization
from kernels.types import SamplingTable
from tests.kernels import grouped
from tests.kernels.steps import Attention, inputs_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_cuts(rng: random.Random, size: int) -> list[tuple[int, int]]:
    """[0, size) in pieces, many of them of one."""
    cuts, start = [], 0
    while start < size:
        end = min(size, start + rng.choice([1, 1, 2, 7, rng.randint(1, size)]))
        cuts.append((start, end))
        start = end
    return cuts


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_attention_of_a_sequence_in_any_pieces(
    ops: Ops, dtype: torch.dtype, seed: int, fp8: bool
) -> None:
    """Contexts of several parts; each step also holds another request, which changes the work."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    length = rng.choice([3, 64, 65, 300, 512, 513, 1100])
    case = Attention(
        rng,
        dtype,
        [(length, length), (rng.choice([1, 40]), 90)],
        head_dim=rng.choice([16, 64, 80, 128]),
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 3, 8]),
        block_size=rng.choice([1, 7, 16, 32]),
        cache_dtype=torch.float8_e4m3fn if fp8 else None,
        has_sinks=True,
    )
    window = rng.choice([None, None, 24, 200, 700])
    settings = (case.scale, window, rng.choice([None, 2.0]), rng.choice([None, case.sinks]))

    def attend(queries: Tensor, lengths: list[tuple[int, int]]) -> Tensor:
        inputs = inputs_of(lengths, case.block_tables[: len(lengths)])
        return ops.attention.attend(queries, case.cache, inputs, *settings)

    whole = attend(case.q, case.lengths)[:length]
    for start, end in random_cuts(rng, length):
        other = case.q[length:] if rng.random() < 0.5 else case.q[:0]
        lengths = [(end - start, end), *([(len(other), 90)] if len(other) else [])]
        piece = attend(torch.cat((case.q[start:end], other)), lengths)[: end - start]
        assert piece.equal(whole[start:end]), (length, start, end, window)


@pytest.mark.parametrize("quantization", [None, "w8a8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_linear_layer_in_any_batch(
    ops: Ops, dtype: torch.dtype, quantization: Quantization | None
) -> None:
    for inputs in (64, 1344, 96):
        check_rows_in_any_batch(ops, dtype, quantization, rows=230, inputs=inputs)


def test_rows_times_weights_as_they_are_stored_in_any_batch(ops: Ops) -> None:
    for kind in grouped.KINDS:
        check_grouped_rows_in_any_batch(ops, kind, rows=120, inputs=512)


def check_grouped_rows_in_any_batch(ops: Ops, kind: grouped.Kind, rows: int, inputs: int) -> None:
    assert ops.pack_stored is not None
    rng, x = random.Random(0), torch.randn(rows, inputs)
    linear = ops.pack_stored([grouped.random_weight(kind, 70, inputs).stored()], None)
    assert linear is not None
    whole = linear(x)
    for start, end in random_cuts(rng, rows):
        assert linear(x[start:end]).equal(whole[start:end]), (kind, start, end)


def check_rows_in_any_batch(
    ops: Ops, dtype: torch.dtype, quantization: Quantization | None, rows: int, inputs: int
) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    x = torch.randn(rows, inputs).to(dtype)
    linear = ops.pack_linear(torch.randn(150, inputs).to(dtype), None, quantization)
    whole = linear(x)
    for start, end in random_cuts(rng, len(x)):
        assert linear(x[start:end]).equal(whole[start:end]), (inputs, start, end)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_other_ops_in_any_batch(ops: Ops, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    x, residual = torch.randn(2, 70, 160).to(dtype)
    weight, ids = torch.randn(160).to(dtype), torch.arange(70)
    cos_sin = torch.randn(70, 16)
    table = SamplingTable(
        torch.full((70,), 0.7),
        torch.full((70,), 9),
        torch.full((70,), 0.9),
        torch.zeros(70),
        ids,
    )

    def run(rows: slice) -> list[Tensor]:
        q, k = (part[rows].view(-1, 10, 16) for part in (x, residual))
        return [
            ops.rms_norm(x[rows], weight, 1e-6),
            *ops.add_rms_norm(x[rows], residual[rows], weight, 1e-6),
            ops.silu_and_mul(x[rows]),
            *ops.rotary(q, k, ids[rows], cos_sin),
            ops.sampling.sample(x[rows], table, ids[rows], ids[rows]),
        ]

    whole = run(slice(0, 70))
    for start, end in random_cuts(rng, 70):
        for piece, expected in zip(run(slice(start, end)), whole, strict=True):
            assert piece.equal(expected[start:end])
