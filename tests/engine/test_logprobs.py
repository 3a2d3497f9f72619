"""Log-probabilities are those of transformers, of output and prompt, however work is cut up."""

from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from engine.schedule.step import TokenLogprobs
from tests.checkpoints import load_oracle
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine
from tests.engine.oracle import logits_of, random_prompts

PROMPTS = random_prompts(24, 80)
TOLERANCE = 1e-4


def run_with_logprobs(
    engine: Engine, requests: list[Request]
) -> dict[str, tuple[list[int], list[TokenLogprobs], list[TokenLogprobs] | None]]:
    """{request id: (tokens, their logprobs, the prompt's)}"""
    results: dict[str, Any] = {request.id: ([], [], None) for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            tokens, logprobs, prompt_logprobs = results[delta.request_id]
            if delta.prompt_logprobs is not None:
                assert prompt_logprobs is None, "they come once"
                assert not tokens, "they come with the first token"
                prompt_logprobs = delta.prompt_logprobs
            results[delta.request_id] = (
                tokens + delta.token_ids,
                logprobs + (delta.logprobs or []),
                prompt_logprobs,
            )
    return results


def assert_logprobs(
    actual: list[TokenLogprobs], logits: torch.Tensor, tokens: list[int], count: int
) -> None:
    """logits [N, V] are those that precede the N tokens."""
    expected = logits.log_softmax(-1)
    assert len(actual) == len(tokens) == len(expected)
    for position, row, token in zip(actual, expected, tokens, strict=True):
        assert position.token_ids[0] == token
        assert len(position.token_ids) == len(position.logprobs) == 1 + count
        for listed, logprob in zip(position.token_ids, position.logprobs, strict=True):
            assert abs(float(row[listed]) - logprob) < TOLERANCE
        top = row.topk(count).values
        assert torch.allclose(torch.tensor(position.logprobs[1:]), top, atol=TOLERANCE)
        assert abs(position.rank - 1 - int((row > row[token]).sum())) <= int(
            ((row - row[token]).abs() < TOLERANCE).sum()
        )


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "config",
    [dict(), dict(max_num_batched_tokens=24, max_num_seqs=24), dict(num_blocks=32, block_size=4)],
    ids=["one batch", "chunks", "preempted"],
)
def test_logprobs_are_those_of_transformers(
    checkpoints: CheckpointFactory, config: dict[str, Any], async_scheduling: bool
) -> None:
    """Also of a prompt that lies in the prefix cache, and with biases, which do not count."""
    counts = [(i % 4, (3, None, 0, 20)[i // 2 % 4]) for i in range(len(PROMPTS))]
    requests = [
        Request(
            str(i),
            prompt,
            SamplingParams(
                temperature=1.5,
                max_tokens=8,
                ignore_eos=True,
                logprobs=count,
                prompt_logprobs=of_prompt,
                logit_bias={7: 5.0} if i % 3 == 0 else {},
            ),
            seed=i,
        )
        for i, (prompt, (count, of_prompt)) in enumerate(zip(PROMPTS, counts, strict=True))
    ]
    again = [Request(f"again {r.id}", r.prompt_token_ids, r.params, r.seed) for r in requests]
    oracle = load_oracle(checkpoints("qwen3"))
    with new_engine(checkpoints("qwen3"), async_scheduling=async_scheduling, **config) as engine:
        results = run_with_logprobs(engine, requests)
        second = run_with_logprobs(engine, again)
        assert (engine.scheduler.stats.preemptions > 0) == ("num_blocks" in config)
    for request in requests:
        prompt, own = request.prompt_token_ids, results[request.id]
        tokens, logprobs, prompt_logprobs = own
        assert second[f"again {request.id}"][0] == tokens
        (logits,) = logits_of(oracle, [prompt + tokens])
        params = request.params
        assert params.logprobs is not None
        before = logits[len(prompt) - 1 : -1]
        assert_logprobs(logprobs, before, tokens, params.logprobs)
        for listed in (prompt_logprobs, second[f"again {request.id}"][2]):
            assert (listed is None) == (params.prompt_logprobs is None)
            if listed is not None and params.prompt_logprobs is not None:
                before = logits[: len(prompt) - 1]
                assert_logprobs(listed, before, prompt[1:], params.prompt_logprobs)


def test_who_asks_for_none_gets_none(checkpoints: CheckpointFactory) -> None:
    with new_engine(checkpoints("qwen3")) as engine:
        asks = Request("a", PROMPTS[3], SamplingParams(logprobs=0), 0)
        other = Request("b", PROMPTS[4], SamplingParams(), 0)
        results = run_with_logprobs(engine, [asks, other])
    assert len(results["a"][1]) == 16 and not results["b"][1]
    assert results["a"][2] is None and results["b"][2] is None


def test_a_resumed_request_has_had_its_prompts_logprobs(checkpoints: CheckpointFactory) -> None:
    params = SamplingParams(temperature=0, prompt_logprobs=1, logprobs=0, max_tokens=6)
    with new_engine(checkpoints("qwen3")) as engine:
        tokens, logprobs, _ = run_with_logprobs(engine, [Request("a", PROMPTS[5], params, 0)])["a"]
        resumed = Request("b", PROMPTS[5], params, 0, output_token_ids=tokens[:2])
        result = run_with_logprobs(engine, [resumed])["b"]
    assert result[2] is None
    assert [p.token_ids for p in result[1]] == [p.token_ids for p in logprobs[2:]]


def test_a_prompt_longer_than_what_is_held_at_once(checkpoints: CheckpointFactory) -> None:
    prompt = random_prompts(12, 400)[10]
    params = SamplingParams(temperature=0, prompt_logprobs=2, max_tokens=1)
    with new_engine(checkpoints("qwen3")) as engine:
        result = run_with_logprobs(engine, [Request("a", prompt, params, 0)])["a"]
    (logits,) = logits_of(load_oracle(checkpoints("qwen3")), [prompt])
    assert result[2] is not None
    assert_logprobs(result[2], logits[:-1], prompt[1:], 2)


CUTS: dict[str, dict[str, Any]] = {
    "chunks": dict(max_num_batched_tokens=24, max_num_seqs=16),
    "preempted": dict(num_blocks=32, block_size=4),
    "alone": dict(max_num_seqs=1),
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", dict(dtype="bfloat16")),
        ("mistral", dict(dtype="float16")),
        ("llama3", dict(dtype="bfloat16", quantization="w8a8", kv_cache_dtype="fp8")),
        ("qwen3", dict(dtype="bfloat16", quantization="int4")),
    ],
    ids=["bfloat16", "float16, window", "w8a8, fp8 cache", "int4"],
)
def test_a_token_has_the_same_bits_however_it_is_computed(
    checkpoints: CheckpointFactory, family: str, options: dict[str, Any]
) -> None:
    """Decoded or as part of a prompt, in a batch or alone, found in the cache or not."""
    directory = checkpoints(family, hidden_size=64, intermediate_size=128)
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, logprobs=1)
    requests = [Request(str(i), PROMPTS[i], params, seed=i) for i in range(0, len(PROMPTS), 2)]
    with new_engine(directory, **options) as engine:
        if engine.runner.ops.name == "cpu-torch":
            pytest.skip("no C++ compiler here")
        whole = run_with_logprobs(engine, requests)
    for name, cut in CUTS.items():
        with new_engine(directory, **options | cut) as engine:
            assert run_with_logprobs(engine, requests) == whole, name
            if family != "mistral":  # whose window gives blocks back in time
                assert (engine.scheduler.stats.preemptions > 0) == (name == "preempted")
