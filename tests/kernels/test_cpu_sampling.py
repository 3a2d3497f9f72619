"""The C++ sampler against the one in plain torch: the same token for the same draw."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from kernels import Ops, reference
from kernels.types import SamplingTable


def params(num_rows: int, seed: int = 0, **fixed: float) -> dict[str, Any]:
    """What `sample` takes: of a table with random parameters, or what is fixed, any rows."""
    rows = 2 * num_rows
    generator = torch.Generator().manual_seed(seed)

    def rand(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=generator) * (high - low) + low

    off = torch.rand(4, rows, generator=generator) < 0.5
    columns = {
        "temperature": torch.where(off[0], 0.6, rand(0.1, 2)),
        "top_k": torch.where(off[1], 0, rand(1, 3000)).long(),
        "top_p": torch.where(off[2], 1.0, rand(0.01, 1)),
        "min_p": torch.where(off[3], 0.0, rand(0, 0.3)),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
    }
    for name, value in fixed.items():
        columns[name] = torch.full_like(columns[name], value)
    return {
        "table": SamplingTable(**columns),
        "rows": torch.randperm(rows, generator=generator)[:num_rows],
        "positions": torch.randint(0, 100_000, (num_rows,), generator=generator),
    }


def assert_same_draws(
    sample: Callable[..., Tensor], logits: Tensor, values: dict[str, Any]
) -> None:
    """Equal tokens, except where the draw lies within rounding of the boundary between two."""
    actual = sample(logits, **values)
    expected = reference.sample(logits, **values)
    differs = actual != expected
    # One in a few hundred at most: a draw hits a boundary's rounding as often as that is wide.
    assert int(differs.sum()) <= max(1, len(actual) // 200), (actual[differs], expected[differs])
    temperature = values["table"].temperature[values["rows"]]
    for row in differs.nonzero().flatten().tolist():
        probs = torch.softmax(logits[row].double() / temperature[row], -1)
        low, high = sorted((int(actual[row]), int(expected[row])))
        assert probs[low + 1 : high].sum() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 17, 255, 256, 257, 5003])
def test_same_tokens_as_the_reference(ops: Ops, dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(vocab)
    rows = 300
    logits = (torch.randn(rows, vocab) * torch.rand(rows, 1) * 6).to(dtype)
    assert_same_draws(ops.sampling.sample, logits, params(rows, vocab))


@pytest.mark.parametrize("only", ["none", "top_k", "top_p", "min_p"])
def test_full_vocabulary(ops: Ops, only: str) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(16, 151_936) * 2).bfloat16()
    fixed: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    fixed.pop(only, None)
    assert_same_draws(ops.sampling.sample, logits, params(16, 5, **fixed))


def test_greedy(ops: Ops) -> None:
    logits = torch.randn(50, 5000).bfloat16()  # with ties: the first of the highest wins
    values = params(50, temperature=0)
    assert torch.equal(ops.sampling.sample(logits, **values), logits.float().argmax(-1))


def test_ties_are_cut_by_token_id(ops: Ops) -> None:
    logits = torch.zeros(400, 1000)
    values = params(400, temperature=1, top_k=7, top_p=1, min_p=0)
    tokens = ops.sampling.sample(logits, **values)
    assert set(tokens.tolist()) == set(range(7))
    values = params(400, temperature=1, top_k=0, top_p=0.0095, min_p=0)
    assert set(ops.sampling.sample(logits, **values).tolist()) == set(range(10))


def test_banned_tokens_are_never_drawn(ops: Ops) -> None:
    logits = torch.full((2000, 600), -torch.inf)
    logits[:, [3, 300, 599]] = torch.tensor([1.0, 2.0, 0.5])
    for seed in range(3):
        drawn = set(ops.sampling.sample(logits, **params(2000, seed)).tolist())
        assert drawn <= {3, 300, 599}


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-44])
def test_a_tiny_temperature_is_greedy(ops: Ops, temperature: float) -> None:
    logits = torch.randn(50, 1000) * 10
    values = params(50, temperature=temperature)
    assert torch.equal(ops.sampling.sample(logits, **values), logits.argmax(-1))


def assert_some_token_is_drawn(
    sample: Callable[..., Tensor], share: float, dtype: torch.dtype, rows: int
) -> None:
    """Of a model that has overflowed: the text is lost, the process is not."""
    generator = torch.Generator().manual_seed(1)
    for vocab, value in itertools.product((1, 320, 5003), (torch.nan, torch.inf, -torch.inf)):
        logits = torch.randn(rows, vocab, generator=generator) * 100
        logits[torch.rand(logits.shape, generator=generator) < share] = value
        tokens = sample(logits.to(dtype), **params(rows, vocab))
        assert ((tokens >= 0) & (tokens < vocab)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.9, 1.0])
def test_logits_that_are_no_numbers(ops: Ops, share: float, dtype: torch.dtype) -> None:
    assert_some_token_is_drawn(ops.sampling.sample, share, dtype, rows=200)


def test_strided_logits(ops: Ops) -> None:
    logits = torch.randn(20, 1001)
    values = params(20)
    whole = ops.sampling.sample(logits[:, :1000].contiguous(), **values)
    assert torch.equal(ops.sampling.sample(logits[:, :1000], **values), whole)


def test_distribution(ops: Ops) -> None:
    rows = 20_000
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf, 0.5]).expand(rows, -1).contiguous()
    values = params(rows, temperature=0.8, top_k=0, top_p=1, min_p=0, seeds=42)
    values["positions"] = torch.arange(rows)
    counts = torch.bincount(ops.sampling.sample(logits, **values), minlength=6)
    expected = torch.softmax(logits[0].double() / 0.8, -1) * rows
    possible = expected > 0
    assert int(counts[~possible].sum()) == 0
    assert chisquare(counts[possible], expected[possible]).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [20, 32, 255, 257, 5003])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_top_logprobs(ops: Ops, dtype: torch.dtype, vocab: int, count: int) -> None:
    torch.manual_seed(vocab)
    # No two equal, so that there is one right order.
    logits = torch.stack([torch.randperm(vocab) for _ in range(5)]) / vocab * 16 - 8
    logits = logits.to(dtype)
    if vocab > 20:
        logits[3, 7] = -torch.inf
    tokens = torch.tensor([0, vocab - 1, 3, 4, 5])
    ids, logprobs, ranks = ops.sampling.top_logprobs(logits, tokens, count)
    expected = logits.double().log_softmax(-1)
    assert torch.equal(ids[:, 0], tokens)
    torch.testing.assert_close(logprobs.double(), expected.gather(1, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logprobs[:, 1:].double(), expected.topk(count).values, atol=1e-5, rtol=1e-5
    )
    own = expected.gather(1, tokens.unsqueeze(1))
    assert torch.equal(ranks, 1 + (expected > own).sum(-1))
    reference_ids, reference_logprobs, reference_ranks = reference.top_logprobs(
        logits, tokens, count
    )
    assert torch.equal(reference_ranks, ranks)
    assert torch.equal(reference_ids[:, 0], tokens)
    torch.testing.assert_close(reference_logprobs, logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_apply_bitmask(ops: Ops, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    allowed = torch.rand(6, vocab, generator=generator) < 0.4
    allowed[0], allowed[1] = True, False
    words = -(-vocab // 32)
    bits = torch.zeros(6, words * 32, dtype=torch.int64)
    bits[:, :vocab] = allowed
    bitmask = (bits.view(6, words, 32) << torch.arange(32)).sum(-1).to(torch.int32)
    logits = torch.randn(6, vocab + 3, generator=generator)
    expected = logits.clone()
    expected[:, :vocab][~allowed] = -torch.inf
    for function in (ops.sampling.apply_bitmask, reference.apply_bitmask):
        masked = logits.clone()
        function(masked[:, :vocab], bitmask)
        assert torch.equal(masked, expected)
