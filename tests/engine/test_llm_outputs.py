"""What `LLM` returns when it is asked for more than text, and words where engines know tokens."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM, RequestOutput, SamplingParams
from engine.sampling_params import MAX_SEED
from tests.conftest import CheckpointFactory
from tests.engine import small_tokenizer
from tests.engine.small_tokenizer import NUM_TOKENS

PROMPT = "the cat sat on the mat, the cat sat"
BYTE_LEVEL = small_tokenizer.load(small_tokenizer.byte_level())
BYTE_FALLBACK = small_tokenizer.load(small_tokenizer.byte_fallback())


@pytest.fixture(scope="module")
def llm(checkpoints: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory: Path = tmp_path_factory.mktemp("llm") / "model"
    shutil.copytree(checkpoints("qwen3"), directory)
    small_tokenizer.one_character_each().save(str(directory / "tokenizer.json"))
    return LLM(
        str(directory),
        dtype="float32",
        device="cpu",
        num_threads=1,
        block_size=4,
        num_blocks=64,
        max_model_len=128,
    )


@pytest.fixture
def generate(llm: LLM) -> Callable[..., RequestOutput]:
    def generate(prompt: Any = PROMPT, **params: Any) -> RequestOutput:
        defaults = dict(temperature=0.0, max_tokens=12, ignore_eos=True)
        (output,) = llm.generate(prompt, SamplingParams(**defaults | params), use_tqdm=False)
        assert llm.engine.scheduler.pool.num_free == 64
        return output

    return generate


def test_n_gives_choices_with_seeds_that_follow_each_other(generate: Any) -> None:
    together = generate(n=4, seed=7, temperature=1.0)
    alone = [generate(seed=7 + i, temperature=1.0) for i in range(4)]
    assert [choice.index for choice in together.outputs] == [0, 1, 2, 3]
    assert [c.token_ids for c in together.outputs] == [o.outputs[0].token_ids for o in alone]
    assert len({tuple(c.token_ids) for c in together.outputs}) == 4


def test_seeds_go_on_after_the_largest(generate: Any) -> None:
    together = generate(n=2, seed=MAX_SEED, temperature=1.0)
    last = generate(seed=-MAX_SEED - 1, temperature=1.0)
    assert together.outputs[1].token_ids == last.outputs[0].token_ids


def test_the_prompt_of_n_choices_is_computed_once(llm: LLM, generate: Any) -> None:
    """All full blocks; the rest of the prompt, less than a block, each choice computes itself."""
    prompt = list(range(50, 50 + 43))  # 10 blocks of 4 tokens, and 3 tokens
    stats = llm.engine.scheduler.stats
    before = stats.prompt_tokens - stats.cached_tokens
    generate(prompt, n=5)
    computed = stats.prompt_tokens - stats.cached_tokens - before
    assert computed == 43 + 4 * 3


def test_logprobs(llm: LLM, generate: Any) -> None:
    output = generate(logprobs=3, prompt_logprobs=0)
    (choice,) = output.outputs
    assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids)
    for token, position in zip(choice.token_ids, choice.logprobs, strict=True):
        assert [p.rank for p in position.values()] == [1, 2, 3]
        assert next(iter(position)) == token  # greedy
        assert position[token].decoded_token == llm.get_tokenizer().decode([token])
        assert sum(math.exp(p.logprob) for p in position.values()) <= 1
    total = sum(p[t].logprob for t, p in zip(choice.token_ids, choice.logprobs, strict=True))
    assert choice.cumulative_logprob == pytest.approx(total)
    first, *others = output.prompt_logprobs
    assert first is None
    assert [list(position) for position in others] == [[t] for t in output.prompt_token_ids[1:]]


def test_logprobs_end_with_the_stop_string(generate: Any) -> None:
    text = generate().outputs[0].text
    choice = generate(stop=[text[3:6]], logprobs=0, n=2).outputs[1]
    assert choice.text == text[: text.index(text[3:6])]
    assert len(choice.logprobs) == len(choice.token_ids) < 12


def test_who_asks_for_no_logprobs_gets_none(generate: Any) -> None:
    output = generate()
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is output.outputs[0].cumulative_logprob is None


def test_bad_words_are_never_completed(generate: Any) -> None:
    text = generate().outputs[0].text
    for word in (text[2], text[4:7], text[:2]):
        other = generate(bad_words=[word]).outputs[0].text
        assert word in text and word not in other


def test_bad_words_that_are_too_long_or_too_many_in_tokens(generate: Any) -> None:
    with pytest.raises(ValueError, match="bad_words: one of them is 65 tokens; at most 64"):
        generate(bad_words=["a" * 65], bad_words_token_ids=[[3] * 64])
    with pytest.raises(ValueError, match="they are 1025 sequences of tokens; at most 1024"):
        generate(bad_words=["ab"], bad_words_token_ids=[[3]] * 1024)


def test_the_stop_string_may_be_part_of_the_text(generate: Any) -> None:
    text = generate().outputs[0].text
    stop = text[3:6]
    end = text.index(stop) + len(stop)
    choice = generate(stop=[stop], include_stop_str_in_output=True).outputs[0]
    assert (choice.text, choice.stop_reason) == (text[:end], stop)


def test_a_prompt_is_cut_to_its_last_tokens(llm: LLM, generate: Any) -> None:
    tokens = llm.get_tokenizer().encode(PROMPT)
    output = generate(truncate_prompt_tokens=5)
    assert output.prompt_token_ids == tokens[-5:]
    assert output.outputs == generate(tokens[-5:]).outputs
    too_long = list(range(3, 203))
    assert generate(too_long, truncate_prompt_tokens=-1).prompt_token_ids == too_long[-127:]
    with pytest.raises(ValueError, match="window is 128"):
        generate(too_long)


def test_a_prompt_may_be_an_array(llm: LLM, generate: Any) -> None:
    expected = generate([5, 6, 7]).outputs
    assert generate(np.array([5, 6, 7])).outputs == expected
    assert generate([np.int64(5), np.int64(6), np.int64(7)]).outputs == expected
    params = SamplingParams(max_tokens=1)
    assert len(llm.generate([np.array([5, 6]), np.array([7])], params, use_tqdm=False)) == 2
    for wrong in ([[5.7, 6.2]], [5.7], [["a"]]):
        with pytest.raises(ValueError, match="prompt 0: should be a text or a list of token ids"):
            generate(wrong)


def test_tokens_may_come_with_what_they_say(generate: Any) -> None:
    """As in vLLM: the tokens count."""
    output = generate({"prompt": "five", "prompt_token_ids": [5]})
    assert (output.prompt, output.prompt_token_ids) == ("five", [5])


def test_detokenize_false_leaves_tokens_alone(generate: Any) -> None:
    choice, plain = (generate(detokenize=flag).outputs[0] for flag in (False, True))
    assert (choice.text, choice.token_ids) == ("", plain.token_ids)


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(allowed_token_ids=[3], bad_words=["x"]), "exclude each other"),
        (dict(stop=["x"], detokenize=False), "need detokenize"),
        (dict(truncate_prompt_tokens=0), "at least 1, or -1"),
        (dict(n=0), "n"),
        (dict(logprobs=21), "logprobs"),
        (dict(presence_penalty=2.1), "presence_penalty"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(repetition_penalty=1e-30), "repetition_penalty"),  # logits would be infinite
        (dict(logit_bias={5: 101}), "logit_bias"),
        (dict(allowed_token_ids=[]), "allowed_token_ids"),
        (dict(bad_words=[""]), "bad_words"),
    ],
)
def test_what_makes_no_sense_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


# --- Single tokens ----------------------------------------------------------------------------


def test_the_bytes_of_tokens_are_those_of_the_text() -> None:
    text = "the cat € 日本 👋"
    tokens = BYTE_LEVEL.encode(text)
    assert b"".join(map(BYTE_LEVEL.token_bytes, tokens)) == text.encode()
    the, cat = (BYTE_FALLBACK.fast.token_to_id(word) for word in ("▁the", "▁cat"))
    assert [BYTE_FALLBACK.token_bytes(t) for t in (the, cat, 3 + 0xE6)] == [
        b" the",
        b" cat",
        b"\xe6",
    ]


def test_special_tokens_stand_for_their_names() -> None:
    assert (BYTE_LEVEL.token_bytes(2), BYTE_LEVEL.is_special(2)) == (b"<eos>", True)
    assert (BYTE_LEVEL.token_bytes(NUM_TOKENS), BYTE_LEVEL.is_special(NUM_TOKENS)) == (b"", False)


def test_bad_words_are_banned_at_the_beginning_and_after_a_space() -> None:
    the = BYTE_LEVEL.encode("the")
    assert len(the) == 1
    assert BYTE_LEVEL.encode_bad_words(["the"]) == [the, BYTE_LEVEL.encode(" the")]
    assert BYTE_LEVEL.encode_bad_words(["ab"]) == [BYTE_LEVEL.encode("ab")]  # " ab" is longer
