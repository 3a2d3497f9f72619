"""Penalties, biases and bans: every token is the best one by the naive definition."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from engine.schedule.step import NewRow, StepPlan
from kernels.reference import penalize
from tests.checkpoints import VOCAB_SIZE, load_oracle
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.oracle import logits_of, random_prompts

NUM_OUTPUT = 16
EOS = 2
HALF = list(range(0, VOCAB_SIZE, 2))
# Each of them strong enough to change a greedy text.
RULES: list[dict[str, Any]] = [
    dict(presence_penalty=2.0),
    dict(presence_penalty=-2.0),
    dict(frequency_penalty=1.5),
    dict(frequency_penalty=-1.0),
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.6),
    dict(presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.2),
    dict(logit_bias={7: 100.0, 9: -3.0}),
    dict(logit_bias={token: -100.0 for token in HALF}),
    dict(logit_bias={token: 2.5 for token in HALF}, frequency_penalty=2.0),
    dict(allowed_token_ids=[5, 11, 17, 64, 319]),
    dict(allowed_token_ids=HALF, repetition_penalty=2.0),
    dict(thinking_limit={"budget": 0, "end": [7]}),
    dict(thinking_limit={"budget": 5, "end": [7, 9]}, frequency_penalty=2.0),
]
# One for each rule, and for what is made of their plain texts.
PROMPTS = random_prompts(len(RULES) + 10, 60)


def naive(
    logits: Tensor, prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> Tensor:
    """Logits [V] after all that the parameters ask for, by vLLM's definitions, in its order."""
    logits = logits.clone()
    if params.allowed_token_ids is not None:
        for token in set(range(VOCAB_SIZE)) - set(params.allowed_token_ids):
            logits[token] = -math.inf
    for word in params.bad_words_token_ids:
        start = len(output) - len(word) + 1
        if start >= 0 and list(output[start:]) == word[:-1]:
            logits[word[-1]] = -math.inf
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(output) < params.min_tokens:
        stops = {*params.stop_token_ids, *([] if params.ignore_eos else [EOS])}
        logits[list(stops)] = -math.inf
    for token in {*prompt, *output}:
        x = float(logits[token])
        penalty = params.repetition_penalty
        logits[token] = x / penalty if x > 0 else x * penalty
    for token, count in Counter(output).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    limit = params.thinking_limit
    if limit is not None and 0 <= len(output) - limit.budget < len(limit.end):
        thoughts = list(output[: limit.budget])
        ends = [thoughts[i : i + len(limit.end)] for i in range(limit.budget)]
        if thoughts[: len(limit.start)] == limit.start and limit.end not in ends:
            logits[:] = -math.inf
            logits[limit.end[len(output) - limit.budget]] = 0
    return logits


def assert_greedy(
    logits: Sequence[Tensor], requests: Sequence[Request], outputs: Sequence[list[int]]
) -> None:
    """Every token was the best of the processed logits, up to rounding."""
    for own, request, output in zip(logits, requests, outputs, strict=True):
        prompt = request.prompt_token_ids
        for i, token in enumerate(output):
            processed = naive(own[len(prompt) - 1 + i], prompt, output[:i], request.params)
            assert processed[token] >= processed.max() - 1e-3, (request.params, i)


@pytest.fixture(scope="module")
def plain(checkpoints: CheckpointFactory) -> list[list[int]]:
    """The greedy text of each prompt without any rule."""
    with new_engine(checkpoints("qwen3")) as engine:
        return tokens_of(run(engine, plain_requests()))


def plain_requests() -> list[Request]:
    return new_requests(PROMPTS, max_tokens=NUM_OUTPUT, ignore_eos=True)


def ruled_requests(plain: Sequence[Sequence[int]]) -> list[Request]:
    """A rule for each prompt; then bad words and stop tokens taken from the plain text."""
    at = len(RULES)
    rules = [
        *RULES,
        *(
            dict(bad_words_token_ids=[list(text[3 : 3 + n])])
            for n, text in enumerate(plain[at : at + 4], 1)
        ),
        dict(
            bad_words_token_ids=[[t] for t in plain[at + 4][:3]]
            + [list(plain[at + 4][4:6]), [8, 9, 8]]
        ),
        dict(stop_token_ids=list(plain[at + 5][:3]), min_tokens=9),
        dict(stop_token_ids=[plain[at + 6][0]], min_tokens=NUM_OUTPUT, frequency_penalty=1.0),
    ]
    return [
        Request(
            f"ruled {i}",
            PROMPTS[i],
            SamplingParams(**dict(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True) | rule),
            seed=i,
        )
        for i, rule in enumerate(rules)
    ]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "config",
    [dict(), dict(max_num_batched_tokens=40, max_num_seqs=40), dict(num_blocks=24, block_size=8)],
    ids=["one batch", "chunks", "preempted"],
)
def test_every_token_is_the_best_by_definition(
    checkpoints: CheckpointFactory,
    plain: list[list[int]],
    config: dict[str, Any],
    async_scheduling: bool,
) -> None:
    """In one batch with requests without rules, whose text stays as it is."""
    requests = ruled_requests(plain)
    with new_engine(checkpoints("qwen3"), async_scheduling=async_scheduling, **config) as engine:
        mixed = [r for pair in zip(requests, plain_requests(), strict=False) for r in pair]
        texts = dict(zip([r.id for r in mixed], tokens_of(run(engine, mixed)), strict=True))
        assert (engine.scheduler.stats.preemptions > 0) == ("num_blocks" in config)
    assert [texts[str(i)] for i in range(len(requests))] == plain[: len(requests)]
    outputs = [texts[request.id] for request in requests]
    sequences = [r.prompt_token_ids + o for r, o in zip(requests, outputs, strict=True)]
    oracle = load_oracle(checkpoints("qwen3"))
    assert_greedy(logits_of(oracle, sequences), requests, outputs)
    for request, output, without in zip(requests, outputs, plain, strict=False):
        assert output != without, f"obeying changes nothing here: {request.params}"


@pytest.mark.parametrize("num_known", [1, 7, NUM_OUTPUT - 1])
def test_rules_hold_for_resumed_requests(
    checkpoints: CheckpointFactory, plain: list[list[int]], num_known: int
) -> None:
    """Counts are those of the tokens that the request brings along."""
    with new_engine(checkpoints("qwen3")) as engine:
        requests = ruled_requests(plain)
        whole = tokens_of(run(engine, requests))
        resumed = [
            Request(r.id, r.prompt_token_ids, r.params, r.seed, "", text[:num_known])
            for r, text in zip(requests, whole, strict=True)
            if len(text) > num_known
        ]
        rest = tokens_of(run(engine, resumed))
    expected = [text[num_known:] for text in whole if len(text) > num_known]
    assert rest == expected


@torch.inference_mode()
def test_several_positions_of_a_row_are_sampled_as_if_one_by_one(
    checkpoints: CheckpointFactory, plain: list[list[int]]
) -> None:
    """Penalties and bans of each are those of the tokens before it, and of no others."""
    num_sampled, num_blocks = 5, 8
    with new_engine(checkpoints("qwen3"), max_num_seqs=32) as engine:
        requests = ruled_requests(plain)
        texts = tokens_of(run(engine, requests))
        whole = [pair for pair in zip(requests, texts, strict=True) if len(pair[1]) == NUM_OUTPUT]
        plan = StepPlan()
        for row, (request, text) in enumerate(whole):
            tokens = request.prompt_token_ids + text
            new = NewRow(
                row=row,
                token_ids=tokens[:-num_sampled],
                num_prompt_tokens=len(request.prompt_token_ids),
                block_tables=[list(range(row * num_blocks, (row + 1) * num_blocks))],
                params=request.params,
                seed=request.seed,
            )
            plan.new_rows.append(new)
            plan.add(row, 0, len(tokens) - 1, num_sampled, drafts=tokens[-num_sampled:-1])
        result = engine.runner.launch(plan).result()
    assert len(whole) > 10
    assert result.token_ids == [text[-num_sampled:] for _, text in whole]


def test_thoughts_are_ended_only_where_they_are_and_go_on(
    checkpoints: CheckpointFactory, plain: list[list[int]]
) -> None:
    """Not in an output that does not begin with them, nor where they have ended before."""
    text = plain[0]
    other = next(token for token in range(3, VOCAB_SIZE) if token not in text)
    cases: list[tuple[dict[str, Any], bool]] = [
        (dict(budget=4, end=[other]), True),
        (dict(budget=4, start=text[:2], end=[other]), True),
        (dict(budget=4, start=[other], end=[other]), False),
        (dict(budget=4, start=text[:5], end=[other]), False),
        (dict(budget=6, end=text[2:4]), False),
        (dict(budget=3, end=text[3:5]), False),  # as by itself
    ]
    request = plain_requests()[0]
    with new_engine(checkpoints("qwen3")) as engine:
        for limit, is_forced in cases:
            given = request.params.model_dump(exclude_unset=True) | {"thinking_limit": limit}
            limited = replace(request, params=SamplingParams(**given))
            (output,) = tokens_of(run(engine, [limited]))
            assert (output != text) == is_forced, limit
            if is_forced:
                assert output[:5] == [*text[:4], other]


def test_a_row_forgets_the_rules_of_its_predecessor(
    checkpoints: CheckpointFactory, plain: list[list[int]]
) -> None:
    with new_engine(checkpoints("qwen3"), max_num_seqs=4) as engine:
        for _ in range(2):
            run(engine, ruled_requests(plain))
            assert tokens_of(run(engine, plain_requests())) == plain


def test_a_batch_without_rules_does_none_of_this(
    checkpoints: CheckpointFactory, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits go to the sampler as the model made them, in one call."""

    def fail(*_: object) -> None:
        raise AssertionError("a batch of plain requests pays for what it does not use")

    with new_engine(checkpoints("qwen3")) as engine:
        run(engine, ruled_requests(plain))
        for processor in engine.runner.sampler.processors:
            monkeypatch.setattr(processor, "process", fail)
        monkeypatch.setattr("engine.sampling.sampler.take_logprobs", fail)
        draws, steps = [], engine.num_steps
        sampling = engine.runner.ops.sampling
        sample = sampling.sample
        monkeypatch.setattr(sampling, "sample", lambda *a: draws.append(a[0].shape) or sample(*a))
        assert tokens_of(run(engine, plain_requests())) == plain
        assert len(draws) == engine.num_steps - steps


def test_rules_hold_for_sampled_tokens(checkpoints: CheckpointFactory) -> None:
    with new_engine(checkpoints("qwen3")) as engine:
        hot = dict(temperature=3.0, max_tokens=12, ignore_eos=True)
        outputs = run(engine, new_requests(PROMPTS, **hot, allowed_token_ids=[5, 11, 17]))
        assert {t for text in tokens_of(outputs) for t in text} == {5, 11, 17}
        outputs = run(engine, new_requests(PROMPTS, **hot, logit_bias={8: 100.0}))
        assert {t for text in tokens_of(outputs) for t in text} == {8}


def test_a_small_bias_is_not_lost_in_the_rounding_of_half_precision(
    checkpoints: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides between equal logits, though two bfloat16 of their size differ by 0.5."""
    equal = torch.full((2, VOCAB_SIZE), 100.0, dtype=torch.bfloat16)
    with new_engine(checkpoints("qwen3"), dtype="bfloat16") as engine:
        monkeypatch.setattr(engine.runner.sampler, "logits", lambda *_: equal)
        requests = [
            Request(str(t), [5], SamplingParams(max_tokens=1, logit_bias={t: 0.01}, top_k=1), 0)
            for t in (7, 200)
        ]
        assert tokens_of(run(engine, requests)) == [[7], [200]]


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    tokens = torch.randint(0, 50, (3, 12))
    expected = RepetitionPenaltyLogitsProcessor(1.4)(tokens, logits.clone())
    zeros = torch.zeros(3)
    penalize(
        logits,
        tokens,
        torch.full((3,), 12),
        torch.zeros(3, 12, dtype=torch.int32),
        torch.full((3,), 1.4),
        zeros,
        zeros,
    )
    assert torch.equal(logits, expected)


def test_what_follows_a_rows_tokens_is_not_penalized() -> None:
    logits = torch.ones(2, 10)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    counts = torch.tensor([[0, 2, 9], [1, 9, 9]], dtype=torch.int32)
    lengths, ones = torch.tensor([2, 1]), torch.ones(2)
    penalize(logits, tokens, lengths, counts, 2 * ones, ones, 0.25 * ones)
    expected = torch.ones(2, 10)
    expected[0, 1] = 0.5
    expected[0, 2] = 0.5 - 1 - 0.5
    expected[1, 4] = 0.5 - 1 - 0.25
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias: token id 320 is outside"),
        (dict(allowed_token_ids=[VOCAB_SIZE]), "allowed_token_ids: token id 320"),
        (dict(bad_words_token_ids=[[5, VOCAB_SIZE]]), "bad_words_token_ids: token id 320"),
        (dict(bad_words=["x"]), "bad_words: an engine knows no words"),
        (dict(n=2), "n: a request has one output"),
        (dict(allowed_token_ids=[EOS, 9], stop_token_ids=[9], min_tokens=1), "all of them end"),
    ],
)
def test_what_an_engine_cannot_obey_is_refused(
    checkpoints: CheckpointFactory, params: dict[str, Any], message: str
) -> None:
    with new_engine(checkpoints("qwen3"), num_blocks=8) as engine:
        with pytest.raises(ValueError, match=message):
            engine.add(Request("r", [5], SamplingParams(**params), 0))
        assert not engine.has_work
