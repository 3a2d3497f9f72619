"""One seed, one text, in whatever company; and what sampling parameters mean and accept."""

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine import LLM
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from engine.strict import explain
from tests.checkpoints import VOCAB_SIZE
from tests.conftest import CheckpointFactory
from tests.engine import small_tokenizer
from tests.engine.helpers import new_engine, new_requests, run, run_one_by_one, tokens_of
from tests.engine.oracle import random_prompts

# --- One seed, one text -----------------------------------------------------------------------

NUM_REQUESTS = 32
NUM_OUTPUT = 16
SAMPLED = dict(
    temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, max_tokens=NUM_OUTPUT, ignore_eos=True
)
PROMPTS = random_prompts(NUM_REQUESTS, 60)


@pytest.fixture(scope="module")
def alone(checkpoints: CheckpointFactory) -> Callable[[], list[list[int]]]:
    """The text of each of the 32 requests when it runs alone."""

    @cache
    def texts() -> list[list[int]]:
        with new_engine(checkpoints("qwen3")) as engine:
            return tokens_of(run_one_by_one(engine, new_requests(PROMPTS, **SAMPLED)))

    return texts


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(max_num_batched_tokens=16, max_num_seqs=16),
        dict(block_size=4, num_blocks=32, max_num_seqs=16),
        dict(enable_prefix_caching=False),
    ],
    ids=["batch of 32", "chunks of 16", "preempted", "no prefix cache"],
)
def test_one_seed_gives_one_text(
    checkpoints: CheckpointFactory,
    alone: Callable[[], list[list[int]]],
    config: dict[str, Any],
    async_scheduling: bool,
) -> None:
    with new_engine(checkpoints("qwen3"), async_scheduling=async_scheduling, **config) as engine:
        together = tokens_of(run(engine, new_requests(PROMPTS, **SAMPLED)))
        assert (engine.scheduler.stats.preemptions > 0) == ("num_blocks" in config)
    assert together == alone()


@pytest.mark.parametrize("num_known", [1, 7, NUM_OUTPUT - 1])
def test_a_resumed_request_continues_with_the_same_tokens(
    checkpoints: CheckpointFactory, alone: Callable[[], list[list[int]]], num_known: int
) -> None:
    params = SamplingParams(**SAMPLED)
    requests = [
        Request(str(i), prompt, params, seed=i, output_token_ids=text[:num_known])
        for i, (prompt, text) in enumerate(zip(PROMPTS, alone(), strict=True))
    ]
    with new_engine(checkpoints("qwen3")) as engine:
        outputs = run(engine, requests)
    assert tokens_of(outputs) == [text[num_known:] for text in alone()]


def test_seeds_make_the_difference(checkpoints: CheckpointFactory) -> None:
    with new_engine(checkpoints("qwen3")) as engine:
        requests = new_requests([PROMPTS[5]] * 20, **SAMPLED)
        texts = tokens_of(run(engine, requests))
        same = new_requests([PROMPTS[5]] * 20, **SAMPLED | dict(seed=3))
        assert tokens_of(run(engine, same)) == [texts[3]] * 20
    assert len({tuple(text) for text in texts}) == 20


def test_greedy_and_sampled_requests_share_a_batch(
    checkpoints: CheckpointFactory, alone: Callable[[], list[list[int]]]
) -> None:
    requests = new_requests(PROMPTS, **SAMPLED)
    greedy = new_requests(PROMPTS, max_tokens=NUM_OUTPUT, ignore_eos=True)
    mixed = [requests[i] if i % 2 else greedy[i] for i in range(NUM_REQUESTS)]
    with new_engine(checkpoints("qwen3")) as engine:
        greedy_alone = tokens_of(
            run(engine, new_requests(PROMPTS, max_tokens=NUM_OUTPUT, ignore_eos=True))
        )
        texts = tokens_of(run(engine, mixed))
    assert texts == [alone()[i] if i % 2 else greedy_alone[i] for i in range(NUM_REQUESTS)]


@pytest.mark.parametrize("cut", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)])
def test_every_cut_reaches_the_sampler(checkpoints: CheckpointFactory, cut: dict[str, Any]) -> None:
    """At their strictest they leave the best token alone, however high the temperature."""
    hot = dict(temperature=5.0, max_tokens=4, ignore_eos=True)
    with new_engine(checkpoints("qwen3")) as engine:
        greedy = run(engine, new_requests(PROMPTS, max_tokens=4, ignore_eos=True))
        assert tokens_of(run(engine, new_requests(PROMPTS, **hot | cut))) == tokens_of(greedy)
        assert tokens_of(run(engine, new_requests(PROMPTS, **hot))) != tokens_of(greedy)


# --- Parameters -------------------------------------------------------------------------------

LARGEST_SEED = 2**63 - 1


@pytest.mark.parametrize(
    "field, accepted, refused",
    [
        ("temperature", [0, 0.5, 1e6], [-0.1, 1e7]),
        ("top_k", [-1, 0, 1, 2**31 - 1], [-2, 2**31, 1.5]),
        ("top_p", [1e-9, 0.5, 1], [0, -0.1, 1.01]),
        ("min_p", [0, 0.5, 1], [-0.1, 1.01]),
        ("seed", [None, 0, LARGEST_SEED, -LARGEST_SEED - 1], [LARGEST_SEED + 1, 0.5, "x"]),
        ("max_tokens", [None, 1, 10**9], [0, -1, "many"]),
        ("min_tokens", [0, 16], [-1]),
        ("ignore_eos", [True, False], ["perhaps"]),
        ("stop", [None, [], "a", ["a", "b"]], [[""], [3], ["x"] * 65]),
        ("stop_token_ids", [[], [0, 5]], [[-1], 3, [0] * 1025]),
    ],
)
def test_bounds(field: str, accepted: list[Any], refused: list[Any]) -> None:
    for value in accepted:
        SamplingParams(**{field: value})
    for value in refused:
        with pytest.raises(ValidationError) as caught:
            SamplingParams(**{field: value})
        ((name, message),) = explain(caught.value.errors())
        assert name.split(".")[0] == field
        assert "(got " in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p"])
def test_numbers_are_finite(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        SamplingParams(**{field: value})


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(temprature=0.5, max_token=3, bananas=1)
    assert dict(explain(caught.value.errors())) == {
        "temprature": "unknown field, did you mean 'temperature'? (got 0.5)",
        "max_token": "unknown field, did you mean 'max_tokens'? (got 3)",
        "bananas": "unknown field, it is not supported (got 1)",
    }


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"min_tokens: 5 must not exceed max_tokens \(4\)"):
        SamplingParams(min_tokens=5, max_tokens=4)
    SamplingParams(min_tokens=4, max_tokens=4)
    SamplingParams(min_tokens=500, max_tokens=None)


def test_parameters_cannot_change_under_a_running_request() -> None:
    with pytest.raises(ValidationError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


# --- Endings, through LLM ---------------------------------------------------------------------

PROMPT = "the cat"
GREEDY = dict(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def directory(checkpoints: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    directory = tmp_path_factory.mktemp("llm") / "model"
    shutil.copytree(checkpoints("qwen3"), directory)
    small_tokenizer.one_character_each().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def llm(directory: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(
        str(directory),
        dtype="float32",
        device="cpu",
        num_threads=1,
        max_model_len=128,
        num_blocks=64,
        async_scheduling=request.param,
    )


def generate(llm: LLM, prompt: Any = PROMPT, **params: Any) -> Any:
    (output,) = llm.generate(prompt, SamplingParams(**GREEDY | params), use_tqdm=False)
    return output.outputs[0]


@pytest.fixture
def tokens(llm: LLM) -> list[int]:
    """What the model says to the prompt, when nothing stops it."""
    return generate(llm, ignore_eos=True).token_ids


def first_new_token(tokens: list[int], at_least: int) -> int:
    """An index from `at_least` on whose token has not come before."""
    return next(i for i in range(at_least, len(tokens)) if tokens[i] not in tokens[:i])


def test_max_tokens_ends_with_length(llm: LLM, tokens: list[int]) -> None:
    output = generate(llm, max_tokens=5, ignore_eos=True)
    assert (output.token_ids, output.finish_reason) == (tokens[:5], "length")
    assert output.text == llm.get_tokenizer().decode(tokens[:5])


def test_none_goes_on_to_the_end_of_the_window(llm: LLM) -> None:
    output = generate(llm, max_tokens=None, ignore_eos=True)
    assert len(output.token_ids) == 128 - len(llm.get_tokenizer().encode(PROMPT))
    assert output.finish_reason == "length"


def test_a_stop_token_ends_the_output_and_is_part_of_it(llm: LLM, tokens: list[int]) -> None:
    """Of the text only if it is asked for, as with stop strings."""
    i = first_new_token(tokens, 4)
    output = generate(llm, stop_token_ids=[tokens[i]], ignore_eos=True)
    assert output.token_ids == tokens[: i + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", tokens[i])
    decode = llm.get_tokenizer().decode
    assert output.text == decode(tokens[:i])
    output = generate(
        llm, stop_token_ids=[tokens[i]], ignore_eos=True, include_stop_str_in_output=True
    )
    assert output.text == decode(tokens[: i + 1])


def test_min_tokens_puts_off_a_stop_token(llm: LLM, tokens: list[int]) -> None:
    """The token cannot even be chosen before: others take its place, and it may come later."""
    i = first_new_token(tokens, 4)
    stop = tokens[i]
    output = generate(llm, stop_token_ids=[stop], min_tokens=i, ignore_eos=True)
    assert output.token_ids == tokens[: i + 1]  # it comes at the first place it may
    output = generate(llm, stop_token_ids=[stop], min_tokens=i + 1, ignore_eos=True)
    assert output.token_ids[:i] == tokens[:i]
    assert output.token_ids[i] != stop
    assert len(output.token_ids) > i


@pytest.mark.parametrize("num_known", [1, 3])
def test_min_tokens_counts_from_the_prompt_when_resumed(
    llm: LLM, tokens: list[int], num_known: int
) -> None:
    i = first_new_token(tokens, 4)
    params = SamplingParams(**GREEDY, stop_token_ids=[tokens[i]], min_tokens=i, ignore_eos=True)
    prompt = llm.get_tokenizer().encode(PROMPT)
    request = Request("r", prompt, params, seed=0, output_token_ids=tokens[:num_known])
    (output,) = run(llm.engine, [request])
    assert output.token_ids == tokens[num_known : i + 1]
    assert output.stop_token == tokens[i]


def test_min_tokens_holds_for_sampled_tokens_too(llm: LLM, tokens: list[int]) -> None:
    """All tokens but two are banned, so it is only ever one of these two, and then the end."""
    banned = [t for t in range(VOCAB_SIZE) if t not in (10, 11)]
    for seed in range(5):
        output = generate(
            llm, temperature=1.0, seed=seed, stop_token_ids=banned, min_tokens=12, max_tokens=13
        )
        assert set(output.token_ids[:12]) <= {10, 11}


@pytest.fixture(scope="module")
def eos_llm(directory: Path, tmp_path_factory: pytest.TempPathFactory, llm: LLM) -> tuple[LLM, int]:
    """A model that says EOS: the same, with a token it says named EOS; and where it says it."""
    tokens = generate(llm, ignore_eos=True).token_ids
    i = first_new_token(tokens, 4)
    copy = tmp_path_factory.mktemp("eos") / "model"
    shutil.copytree(directory, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[i]]}))
    config = llm.config.model_dump() | dict(model=str(copy))
    return LLM(**config), i


def test_eos_ends_the_output(eos_llm: tuple[LLM, int], tokens: list[int]) -> None:
    llm, i = eos_llm
    output = generate(llm)
    assert output.text == llm.get_tokenizer().decode(tokens[:i])
    assert output.token_ids == tokens[: i + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_ignore_eos_goes_on(eos_llm: tuple[LLM, int], tokens: list[int]) -> None:
    llm, _ = eos_llm
    output = generate(llm, ignore_eos=True)
    assert (output.token_ids, output.finish_reason) == (tokens, "length")


def test_min_tokens_puts_off_eos(eos_llm: tuple[LLM, int], tokens: list[int]) -> None:
    llm, i = eos_llm
    output = generate(llm, min_tokens=i + 1)
    assert output.token_ids[:i] == tokens[:i]
    assert output.token_ids[i] != tokens[i]
    assert generate(llm, min_tokens=24).finish_reason == "length"


def test_min_tokens_bans_nothing_when_eos_is_ignored(
    eos_llm: tuple[LLM, int], tokens: list[int]
) -> None:
    llm, _ = eos_llm
    assert generate(llm, min_tokens=24, ignore_eos=True).token_ids == tokens


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = generate(llm, ignore_eos=True)
    stop = whole.text[6:9]
    output = generate(llm, stop=[stop], ignore_eos=True)
    assert output.text == whole.text[: whole.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    # The tokens up to the one that completed it.
    decode = llm.get_tokenizer().decode
    count = len(output.token_ids)
    assert output.token_ids == whole.token_ids[:count]
    assert stop in decode(output.token_ids) and stop not in decode(output.token_ids[:-1])
    assert llm.engine.scheduler.pool.num_free == 64


def test_min_tokens_puts_off_a_stop_string(llm: LLM) -> None:
    whole = generate(llm, ignore_eos=True)
    output = generate(llm, stop=[whole.text[6:9]], min_tokens=9, ignore_eos=True)
    assert len(output.token_ids) > 9
    assert output.text.startswith(whole.text[:9])


def test_each_prompt_has_its_own_parameters_and_place(llm: LLM) -> None:
    prompts = ["the cat", "a hat", [5, 6, 7], {"prompt": "the"}, {"prompt_token_ids": [9]}]
    params = [SamplingParams(**GREEDY | dict(max_tokens=n)) for n in (3, 9, 1, 5, 24)]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in together] == [3, 9, 1, 5, 24]
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (same,) = llm.generate([prompt], one, use_tqdm=False)
        assert output.outputs == same.outputs
        assert output.prompt_token_ids == same.prompt_token_ids
    assert [output.prompt for output in together] == ["the cat", "a hat", None, "the", None]


def test_without_a_seed_a_program_says_the_same_in_every_run(directory: Path) -> None:
    def run_program() -> list[str]:
        llm = LLM(str(directory), dtype="float32", device="cpu", num_threads=1, num_blocks=64)
        params = SamplingParams(temperature=1.0, max_tokens=8)
        return [o.outputs[0].text for o in llm.generate([PROMPT] * 3, params, use_tqdm=False)]

    texts = run_program()
    assert texts == run_program()
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "the prompt is empty"),
        ([1] * 128, "128 tokens.*context window is 128"),
        ([400], "token id 400 is outside the vocabulary"),
        ({"text": "x"}, r"unknown keys \['text'\]; known: .*, cache_salt"),
        ({"prompt_token_ids": "x"}, "should be a list of token ids"),
        ({}, "needs 'prompt' or 'prompt_token_ids'"),
    ],
)
def test_a_prompt_that_cannot_run_stops_the_call_before_it_starts(
    llm: LLM, prompt: Any, message: str
) -> None:
    steps = llm.engine.num_steps
    with pytest.raises(ValueError, match=f"prompt 1: .*{message}"):
        llm.generate(["fine", prompt], SamplingParams(**GREEDY), use_tqdm=False)
    assert llm.engine.num_steps == steps and not llm.engine.has_work


@pytest.mark.parametrize(("owner", "method"), [(LLM, "_advance"), (ModelRunner, "launch")])
def test_an_interrupt_leaves_no_request_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    """Nor blocks that count as cached and have never been computed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    prompt = list(range(10, 60))
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([prompt], params, use_tqdm=False)
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pool.num_free == 64
    first, again = (llm.generate([prompt], params, use_tqdm=False)[0] for _ in range(2))
    assert first.outputs[0].token_ids == again.outputs[0].token_ids
    assert again.num_cached_tokens > 0
    if owner is ModelRunner:
        assert first.num_cached_tokens == 0
