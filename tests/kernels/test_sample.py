"""Sampling: the distribution is the one asked for, the randomness a function of its counter."""

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from kernels.reference import sample, uniform
from kernels.types import SamplingTable

DRAWS = 20_000


def draw(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    count: int = DRAWS,
) -> Tensor:
    """`count` tokens of one distribution, from as many (seed, position) pairs."""
    index = torch.arange(count)
    table = SamplingTable(
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        torch.full((count,), min_p),
        seeds=index // 100,
    )
    return sample(logits.expand(count, -1).clone(), table, index, index % 100)


def probabilities(logits: Tensor, temperature: float, keep: set[int]) -> list[float]:
    """The distribution by definition: softmax at that temperature over the tokens kept."""
    weights = [
        math.exp(logit / temperature) if token in keep else 0.0
        for token, logit in enumerate(logits.tolist())
    ]
    return [weight / sum(weights) for weight in weights]


def assert_drawn_from(tokens: Tensor, expected: list[float]) -> None:
    """χ² goodness of fit. Seeds are fixed, so that this passes always or never.

    A right sampler fails one choice of seeds in a thousand; one that gives 0.42 to a token of 0.40
    fails nearly all.
    """
    counts = torch.bincount(tokens, minlength=len(expected)).tolist()
    possible = [i for i, p in enumerate(expected) if p > 0]
    assert all(counts[i] == 0 for i, p in enumerate(expected) if p == 0), "an excluded token"
    if len(possible) > 1:
        observed = [counts[i] for i in possible]
        fit = scipy.stats.chisquare(observed, [expected[i] * len(tokens) for i in possible])
        assert fit.pvalue > 1e-3, f"p = {fit.pvalue}: {observed}"


#                            0.4   0.25  0.15  0.1   0.06  0.04
LOGITS = torch.tensor([0.40, 0.06, 0.25, 0.04, 0.15, 0.10]).log() + 3.0
ALL = {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0, 50.0])
def test_distribution_at_a_temperature(temperature: float) -> None:
    tokens = draw(LOGITS, temperature=temperature)
    assert_drawn_from(tokens, probabilities(LOGITS, temperature, ALL))


@pytest.mark.parametrize(
    "top_k, keep", [(1, {0}), (2, {0, 2}), (4, {0, 2, 4, 5}), (6, ALL), (99, ALL), (0, ALL)]
)
def test_top_k_keeps_the_k_most_probable(top_k: int, keep: set[int]) -> None:
    assert_drawn_from(draw(LOGITS, top_k=top_k), probabilities(LOGITS, 1.0, keep))


@pytest.mark.parametrize(
    "top_p, keep",
    [
        (1e-6, {0}),
        (0.39, {0}),
        (0.41, {0, 2}),
        (0.64, {0, 2}),
        (0.66, {0, 2, 4}),
        (0.95, {0, 1, 2, 4, 5}),
        (0.97, ALL),
        (1.0, ALL),
    ],
)
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p: float, keep: set[int]) -> None:
    assert_drawn_from(draw(LOGITS, top_p=top_p), probabilities(LOGITS, 1.0, keep))


@pytest.mark.parametrize(
    "min_p, keep",
    [(0.0, ALL), (0.09, ALL), (0.11, ALL - {3}), (0.37, {0, 2, 4}), (0.38, {0, 2}), (1.0, {0})],
)
def test_min_p_keeps_what_is_that_share_of_the_best(min_p: float, keep: set[int]) -> None:
    assert_drawn_from(draw(LOGITS, min_p=min_p), probabilities(LOGITS, 1.0, keep))


def test_temperature_comes_before_the_cuts() -> None:
    """At temperature 2 the three best hold 0.67, no longer 0.80: 0.7 takes four of them."""
    expected = probabilities(LOGITS, 2.0, {0, 2, 4, 5})
    assert_drawn_from(draw(LOGITS, temperature=2.0, top_p=0.7), expected)


def test_top_p_is_a_share_of_what_min_p_and_top_k_left() -> None:
    """min_p leaves 0.40, 0.25, 0.15, 0.10; top_k 0.40, 0.25, 0.15; of their 0.8, 0.75 is 0.6."""
    tokens = draw(LOGITS, min_p=0.2, top_k=3, top_p=0.75)
    assert_drawn_from(tokens, probabilities(LOGITS, 1.0, {0, 2}))


def test_equal_logits_are_cut_to_exactly_k() -> None:
    tokens = draw(torch.zeros(8), top_k=3)
    assert_drawn_from(tokens, probabilities(torch.zeros(8), 1.0, {0, 1, 2}))


def test_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2000)
    tokens = draw(logits, top_k=40, count=2000)
    keep = set(logits.topk(40).indices.tolist())
    assert_drawn_from(tokens, probabilities(logits, 1.0, keep))


def test_temperature_0_is_argmax_whatever_else_is_set() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 30)
    index = torch.arange(50)
    table = SamplingTable(
        torch.zeros(50), torch.full((50,), 7), torch.full((50,), 0.5), torch.full((50,), 0.2), index
    )
    tokens = sample(logits, table, index, index)
    assert tokens.equal(logits.argmax(-1))


def test_each_row_has_its_own_parameters() -> None:
    """A mixed batch gives each row what it gets in a batch of its own."""
    torch.manual_seed(0)
    logits = torch.randn(200, 30)
    table = SamplingTable(
        torch.tensor([0.0, 0.7, 1.0, 3.0]).repeat(50),
        torch.tensor([0, 5, 0, 0, 1]).repeat(40),
        torch.tensor([1.0, 1.0, 0.6]).repeat(67)[:200],
        torch.tensor([0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.1]).repeat(29)[:200],
        torch.arange(200) * 31,
    )
    rows, positions = torch.randperm(200), torch.arange(200) % 17
    together = sample(logits, table, rows, positions)
    for i in range(200):
        alone = sample(logits[i : i + 1], table, rows[i : i + 1], positions[i : i + 1])
        assert alone.item() == together[i]


def test_impossible_tokens_are_never_drawn() -> None:
    """Logits of minus infinity, at both ends of the vocabulary."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf])
    assert_drawn_from(draw(logits), probabilities(logits, 1.0, {1, 3}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=dtype)
    assert_drawn_from(draw(logits), probabilities(logits, 1.0, {0, 1, 2, 3}))


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-12])
def test_low_temperatures_approach_argmax(temperature: float) -> None:
    assert draw(LOGITS, temperature=temperature, count=100).eq(0).all()


def test_the_lowest_temperatures_are_argmax_too() -> None:
    assert draw(LOGITS + 20.0, temperature=1e-38, count=100).eq(0).all()


# --- The random numbers -----------------------------------------------------------------------

MASK = 2**64 - 1


def splitmix64(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def inverse_splitmix64(x: int) -> int:
    """The finalizer backwards: finds the counter that draws a given number."""
    x ^= (x >> 31) ^ (x >> 62)
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    x ^= (x >> 27) ^ (x >> 54)
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    return x ^ (x >> 30) ^ (x >> 60)


def seed_that_draws(bits: int) -> int:
    """The seed whose random bits at position 0 are these 64."""
    seed = inverse_splitmix64((inverse_splitmix64(bits) - 0x9E3779B97F4A7C15) & MASK)
    return seed - 2**64 if seed >= 2**63 else seed


def expected_uniform(seed: int, position: int) -> float:
    state = splitmix64(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15
    return (splitmix64(state & MASK) >> 11) / 2**53


def test_uniform_is_splitmix64_of_seed_and_position() -> None:
    """Bit by bit, for the text of a seed must outlive any implementation."""
    seeds = [0, 1, -1, 2, 42, 2**63 - 1, -(2**63), 123456789123456789]
    positions = [0, 1, 2, 1000, 2**31, 2**40]
    pairs = [(seed, position) for seed in seeds for position in positions]
    drawn = uniform(*torch.tensor(pairs).unbind(1))
    assert drawn.dtype == torch.float64
    assert drawn.tolist() == [expected_uniform(*pair) for pair in pairs]


@pytest.mark.parametrize("bits, u", [(0, 0.0), (MASK, 1 - 2**-53)], ids=["least", "greatest"])
def test_the_extreme_draws_give_possible_tokens(bits: int, u: float) -> None:
    """Neither end of [0, 1) may fall on the impossible tokens at either end of the vocabulary."""
    torch.manual_seed(0)
    logits = torch.randn(200, 50)
    logits[:, :2] = logits[:, -2:] = -math.inf
    seeds = torch.full((200,), seed_that_draws(bits))
    positions = torch.zeros(200, dtype=torch.int64)
    assert uniform(seeds, positions).eq(u).all()
    off = torch.zeros(200)
    table = SamplingTable(off + 1, off.long(), off + 1, off, seeds)
    tokens = sample(logits, table, torch.arange(200), positions)
    assert tokens.eq(2 if bits == 0 else 47).all()


def grid() -> Tensor:
    """[seeds, positions] of consecutive integers, the way they come in practice."""
    seeds, positions = torch.meshgrid(torch.arange(400), torch.arange(400), indexing="ij")
    return uniform(seeds.flatten(), positions.flatten()).view(400, 400)


def test_uniform_is_uniform() -> None:
    drawn = grid().flatten()
    assert drawn.min() >= 0 and drawn.max() < 1
    assert drawn.unique().numel() == drawn.numel()
    # 160,000 draws: the standard errors of mean and variance are 0.0007 and 0.0002.
    assert abs(drawn.mean() - 1 / 2) < 0.003
    assert abs(drawn.var() - 1 / 12) < 0.001
    assert scipy.stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3


def test_neighbouring_seeds_and_positions_are_independent() -> None:
    drawn = grid() - 0.5
    for seed_step, position_step in [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]:
        a = drawn[: 400 - seed_step, : 400 - position_step]
        b = drawn[seed_step:, position_step:]
        correlation = (a * b).mean() * 12
        assert abs(correlation) < 0.0125, (seed_step, position_step)  # five standard errors


def test_the_draw_inverts_the_cumulative_distribution() -> None:
    """Token t is drawn exactly when u lies in its interval of the cumulative distribution."""
    torch.manual_seed(0)
    probs = torch.randn(500, 20).softmax(-1)
    seeds, positions = torch.arange(500), torch.arange(500) % 7
    off = torch.zeros(500)
    table = SamplingTable(off + 1, off.long(), off + 1, off, seeds)
    tokens = sample(probs.log(), table, torch.arange(500), positions)
    for i, u in enumerate(uniform(seeds, positions).tolist()):
        below = probs[i, : tokens[i]].double().sum()
        assert below - 1e-6 <= u <= below + probs[i, tokens[i]] + 1e-6
