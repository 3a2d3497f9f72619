"""Sampling parameters over HTTP, with the real `openai` client: each changes what comes back."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.checkpoints import VOCAB_SIZE, load_oracle
from tests.deployments.in_process import InProcessApi, serve_in_process

PROMPT = "the cat sat on the mat"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "chat"
    shutil.copytree(tiny_model, directory)
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}.{% endif %}{% endfor %}"
    )
    return directory


@pytest.fixture(scope="module")
def api(model: Path) -> Iterator[InProcessApi]:
    with serve_in_process(str(model)) as api:
        yield api
        api.assert_idle()


def complete(api: InProcessApi, prompt: Any = PROMPT, **options: Any) -> Completion:
    defaults = dict(model=None, temperature=0, max_tokens=12, extra_body={})
    options = defaults | options
    options["extra_body"] = {"ignore_eos": True} | options["extra_body"]
    options["model"] = api.front.model_name
    return api.run(api.openai.completions.create(prompt=prompt, **options))


def chat(api: InProcessApi, **options: Any) -> ChatCompletion:
    """The answer; a streamed one put together again from its chunks."""
    defaults = dict(temperature=0, max_tokens=12, extra_body={"ignore_eos": True})
    options = defaults | options

    async def whole() -> ChatCompletion:
        return await api.openai.chat.completions.create(
            model=api.front.model_name, messages=MESSAGES, **options
        )

    async def chunks() -> list[ChatCompletionChunk]:
        return [chunk async for chunk in await whole()]  # type: ignore[attr-defined]

    if not options.get("stream"):
        return api.run(whole())
    options["stream_options"] = {"include_usage": True}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in api.run(chunks()):
        for part in chunk.choices:
            choice = choices.setdefault(
                part.index, {"index": part.index, "message": {"role": "assistant", "content": ""}}
            )
            choice["message"]["content"] += part.delta.content or ""
            choice["finish_reason"] = part.finish_reason
            if part.logprobs is not None:
                merged = choice.setdefault("logprobs", {"content": [], "refusal": None})
                merged["content"] += part.logprobs.model_dump()["content"]
    return ChatCompletion.model_validate(
        {
            "id": "x",
            "created": 0,
            "model": "x",
            "object": "chat.completion",
            "choices": [choices[i] for i in sorted(choices)],
            "usage": chunk.usage.model_dump(),
        }
    )


def token(api: InProcessApi, text: str) -> int:
    (only,) = api.front.tokenizer.encode(text)
    return only


# --- What is sampled --------------------------------------------------------------------------


@BOTH
def test_logit_bias_bans_and_forces_tokens(api: InProcessApi, stream: bool) -> None:
    text = chat(api, stream=stream).choices[0].message.content or ""
    banned = chat(api, stream=stream, logit_bias={str(token(api, text[0])): -100})
    assert (banned.choices[0].message.content or "")[0] != text[0]
    forced = chat(api, stream=stream, logit_bias={str(token(api, "q")): 100})
    assert forced.choices[0].message.content == "q" * 12


def test_temperature_seed_and_the_narrowing_of_choices(api: InProcessApi) -> None:
    greedy = complete(api).choices[0].text
    hot = dict(temperature=1.5, seed=3)
    assert complete(api, **hot).choices[0].text == complete(api, **hot).choices[0].text
    assert len({complete(api, temperature=1.5, seed=i).choices[0].text for i in range(4)}) == 4
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        assert complete(api, **hot, extra_body=narrow).choices[0].text == greedy
    assert complete(api, **hot, top_p=1e-6).choices[0].text == greedy
    assert complete(api, **hot, extra_body={"top_k": 2}).choices[0].text != greedy
    assert complete(api, max_tokens=5).choices[0].text == greedy[:5]


def test_penalties_keep_tokens_from_coming_again(api: InProcessApi) -> None:
    bias = {str(token(api, letter)): 50 for letter in "abcdefghijklmnop"}
    plain = complete(api, logit_bias=bias).choices[0].text
    assert len(set(plain)) < 12
    for penalty in (dict(presence_penalty=2.0), dict(frequency_penalty=2.0)):
        # Each token that has come is set back against the others, which are as probable but for
        # the model's own preference.
        text = complete(api, logit_bias=bias, **penalty).choices[0].text
        assert len(set(text)) > len(set(plain))
    text = complete(api, extra_body={"repetition_penalty": 2.0}, logit_bias=bias).choices[0].text
    assert text != plain


def test_allowed_and_bad_words(api: InProcessApi) -> None:
    plain = complete(api).choices[0].text
    allowed = [token(api, letter) for letter in "xyz"]
    text = complete(api, extra_body={"allowed_token_ids": allowed}).choices[0].text
    assert set(text) <= set("xyz")
    word = plain[2:4]
    assert word not in complete(api, extra_body={"bad_words": [word]}).choices[0].text
    tokens = {"bad_words_token_ids": [[token(api, word[0]), token(api, word[1])]]}
    assert word not in complete(api, extra_body=tokens).choices[0].text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_checkpoints_recommendations_are_the_defaults(
    api: InProcessApi, model: Path, tmp_path: Path, path: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    recommended = {"do_sample": False, "repetition_penalty": 1.9, "max_new_tokens": 7}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(recommended))
    body = {"ignore_eos": True, "prompt": PROMPT}
    if "chat" in path:
        body = {"ignore_eos": True, "messages": MESSAGES}
    asked = {"temperature": 0, "repetition_penalty": 1.9, "max_tokens": 7}
    expected = api.post(path, **body | asked).json()
    assert expected["usage"]["completion_tokens"] == 7
    assert (
        api.post(path, **body | asked | {"repetition_penalty": 1}).json()["choices"]
        != (expected["choices"])
    )
    with serve_in_process(str(tmp_path / "model")) as recommending:
        assert recommending.post(path, **body).json()["choices"] == expected["choices"]
        longer = recommending.post(path, **body, max_tokens=9).json()
        assert longer["usage"]["completion_tokens"] == 9


# --- n and best_of ----------------------------------------------------------------------------


@BOTH
def test_n_choices_are_those_of_the_following_seeds(api: InProcessApi, stream: bool) -> None:
    answer = chat(api, n=3, seed=5, temperature=1.0, stream=stream)
    alone = [chat(api, seed=5 + i, temperature=1.0).choices[0] for i in range(3)]
    assert [c.message.content for c in answer.choices] == [c.message.content for c in alone]
    assert len({c.message.content for c in answer.choices}) == 3
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == len(PROMPT)


def test_choices_of_several_prompts_are_numbered_one_after_another(api: InProcessApi) -> None:
    both = complete(api, ["the", "a cat"], n=2, seed=3, temperature=1.0)
    alone = [
        complete(api, prompt, seed=seed, temperature=1.0).choices[0].text
        for prompt in ("the", "a cat")
        for seed in (3, 4)
    ]
    assert [(c.index, c.text) for c in both.choices] == list(enumerate(alone))
    assert both.usage is not None and both.usage.prompt_tokens == len("thea cat")


def test_best_of_returns_the_most_probable_choices(api: InProcessApi) -> None:
    sampled = dict(seed=11, temperature=1.0, logprobs=0)
    everyone = complete(api, n=6, **sampled).choices
    best = complete(api, extra_body={"best_of": 6}, n=2, **sampled)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    expected = sorted(everyone, key=mean, reverse=True)[:2]
    assert [c.text for c in best.choices] == [c.text for c in expected]
    assert best.usage is not None and best.usage.completion_tokens == 72
    without = complete(api, extra_body={"best_of": 6}, n=2, seed=11, temperature=1.0)
    assert [c.text for c in without.choices] == [c.text for c in expected]
    assert without.choices[0].logprobs is None


# --- Log-probabilities ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(model: Path) -> Any:
    """oracle(tokens): log-probabilities [length, vocab] of what follows each token."""
    loaded = load_oracle(model)

    @torch.inference_mode()
    def logprobs(tokens: list[int]) -> torch.Tensor:
        return loaded(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    return logprobs


@BOTH
def test_chat_logprobs(api: InProcessApi, oracle: Any, stream: bool) -> None:
    answer = chat(api, logprobs=True, top_logprobs=4, stream=stream)
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    tokens = api.front.tokenizer.encode(PROMPT + (choice.message.content or ""))
    expected = oracle(tokens)[len(PROMPT) - 1 : -1]
    assert len(content) == 12
    for entry, row in zip(content, expected, strict=True):
        assert entry.bytes == list(entry.token.encode())
        assert abs(entry.logprob - float(row[token(api, entry.token)])) < 1e-4
        assert len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].token == entry.token
        for top, logprob in zip(entry.top_logprobs, row.topk(4).values.tolist(), strict=True):
            assert abs(top.logprob - logprob) < 1e-4
    assert chat(api, stream=stream).choices[0].logprobs is None


def test_streamed_logprobs_are_not_ahead_of_their_text(api: InProcessApi) -> None:
    """Where text is held back because it may become a stop string, so are its tokens."""
    text = chat(api).choices[0].message.content or ""
    stop = text[2:5] + "no"

    async def chunks() -> list[Any]:
        stream = await api.openai.chat.completions.create(
            model=api.front.model_name,
            messages=MESSAGES,
            temperature=0,
            max_tokens=12,
            logprobs=True,
            stop=[stop],
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return [chunk.choices[0] async for chunk in stream]

    content = tokens = ""
    for choice in api.run(chunks()):
        content += choice.delta.content or ""
        if choice.logprobs is not None:
            tokens += "".join(entry.token for entry in choice.logprobs.content)
        assert content.startswith(tokens)
    assert content == tokens == text


def test_completion_logprobs(api: InProcessApi, oracle: Any) -> None:
    (choice,) = complete(api, logprobs=2).choices
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == list(range(12))
    expected = oracle(api.front.tokenizer.encode(PROMPT + choice.text))[len(PROMPT) - 1 : -1]
    assert logprobs.token_logprobs == pytest.approx(
        [float(row.max()) for row in expected], abs=1e-4
    )
    assert logprobs.top_logprobs is not None
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


@BOTH
def test_echo_begins_the_text_with_the_prompt(api: InProcessApi, stream: bool) -> None:
    plain = complete(api).choices[0].text
    tokens = api.front.tokenizer.encode(PROMPT)
    if not stream:
        assert complete(api, echo=True).choices[0].text == PROMPT + plain
        assert complete(api, tokens, echo=True, n=2).choices[1].text == PROMPT + plain
        return

    async def text() -> str:
        chunks = await api.openai.completions.create(
            model=api.front.model_name,
            prompt=PROMPT,
            temperature=0,
            max_tokens=12,
            echo=True,
            logprobs=1,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        listed = [chunk.choices[0] async for chunk in chunks]
        offsets = [o for c in listed for o in c.logprobs.text_offset]
        assert offsets == list(range(len(PROMPT) + 12))
        return "".join(choice.text for choice in listed)

    assert api.run(text()) == PROMPT + plain


@pytest.mark.parametrize("stop", [None, ["no such text"]])
@pytest.mark.parametrize("prompt", ["the", "t"])
def test_an_echoed_prompt_has_all_its_logprobs(
    api: InProcessApi, prompt: str, stop: list[str] | None
) -> None:
    """Also where the text comes step by step, as a stop string wants it."""
    answer = complete(api, prompt, echo=True, logprobs=1, stop=stop)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(prompt) + 12
    assert logprobs.token_logprobs[0] is None


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_as_lm_evaluation_harness_does(
    api: InProcessApi, oracle: Any, max_tokens: int
) -> None:
    """Its local-completions model: token lists, echo, logprobs=1, and a context length."""
    requests = [("the cat", " sat"), ("a", " mat on the floor")]
    prompts = [api.front.tokenizer.encode(context + text) for context, text in requests]
    answer = complete(
        api, prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens * 2
    for (context, text), tokens, choice in zip(requests, prompts, answer.choices, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None and logprobs.tokens is not None
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert "".join(logprobs.tokens[: len(tokens)]) == context + text
        scored = slice(len(context), len(logprobs.token_logprobs) - max_tokens)
        expected = oracle(tokens)
        values = [float(expected[i - 1, tokens[i]]) for i in range(len(context), len(tokens))]
        assert logprobs.token_logprobs[scored] == pytest.approx(values, abs=1e-4)
        best = [float(expected[i - 1].max()) for i in range(len(context), len(tokens))]
        tops = [max(top.values()) for top in logprobs.top_logprobs[scored]]
        assert tops == pytest.approx(best, abs=1e-4)


def test_prompt_logprobs_as_vllm_spells_them(api: InProcessApi, oracle: Any) -> None:
    tokens = api.front.tokenizer.encode(PROMPT)
    expected = oracle(tokens)
    chatted = chat(api, extra_body={"prompt_logprobs": 1}).model_dump()["prompt_logprobs"]
    completed = complete(api, extra_body={"prompt_logprobs": 1}).choices[0].model_dump()
    assert completed["prompt_logprobs"] == chatted
    assert chatted[0] is None
    for i, position in enumerate(chatted[1:], start=1):
        own = position[str(tokens[i])]
        assert own["decoded_token"] == PROMPT[i]
        assert abs(own["logprob"] - float(expected[i - 1, tokens[i]])) < 1e-4
        assert own["rank"] == 1 + int((expected[i - 1] > expected[i - 1, tokens[i]]).sum())
        assert len(position) == (1 if own["rank"] == 1 else 2)


# --- Text -------------------------------------------------------------------------------------


@BOTH
def test_a_stop_string_split_across_tokens_does_not_leak(api: InProcessApi, stream: bool) -> None:
    text = chat(api).choices[0].message.content or ""
    stop = text[4:8]
    before = text[: text.index(stop)]
    answer = chat(api, stop=[stop], stream=stream)
    assert answer.choices[0].message.content == before
    assert answer.choices[0].finish_reason == "stop"
    included = chat(
        api,
        stop=[stop],
        stream=stream,
        extra_body={"ignore_eos": True, "include_stop_str_in_output": True},
    )
    assert included.choices[0].message.content == before + stop


@BOTH
def test_a_stop_token_is_part_of_the_text_only_on_request(api: InProcessApi, stream: bool) -> None:
    text = chat(api).choices[0].message.content or ""
    i = next(i for i in range(3, len(text)) if text[i] not in text[:i])
    stop = {"ignore_eos": True, "stop_token_ids": [token(api, text[i])]}
    answer = chat(api, stream=stream, extra_body=stop)
    assert answer.choices[0].message.content == text[:i]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == i + 1
    told = chat(api, stream=stream, extra_body=stop | {"include_stop_str_in_output": True})
    assert told.choices[0].message.content == text[: i + 1]
    later = chat(api, stream=stream, extra_body=stop | {"min_tokens": i + 2})
    assert (later.choices[0].message.content or "")[:i] == text[:i]
    assert later.usage is not None and later.usage.completion_tokens > i + 1


def test_the_end_of_sequence_ends_the_text_unless_it_is_ignored(api: InProcessApi) -> None:
    """The bias makes it the only choice: its token is <eos>, which is special."""
    eos = {"2": 100}
    said = complete(api, logit_bias=eos, extra_body={"ignore_eos": False})
    assert (said.choices[0].text, said.choices[0].finish_reason) == ("", "stop")
    ignored = complete(api, logit_bias=eos, max_tokens=3)
    assert (ignored.choices[0].text, ignored.choices[0].finish_reason) == ("", "length")
    shown = complete(api, logit_bias=eos, max_tokens=3, extra_body={"skip_special_tokens": False})
    assert shown.choices[0].text == "<eos>" * 3
    later = complete(api, logit_bias=eos, extra_body={"ignore_eos": False, "min_tokens": 4})
    assert later.usage is not None and later.usage.completion_tokens == 5
    assert len(later.choices[0].text) == 4


def test_tokens_without_text(api: InProcessApi) -> None:
    answer = complete(api, extra_body={"detokenize": False})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "length")
    assert answer.usage is not None and answer.usage.completion_tokens == 12


def test_the_last_message_is_continued(api: InProcessApi) -> None:
    """The template here ends the assistant's messages with a full stop, but for one to go on."""
    half = [*MESSAGES, {"role": "assistant", "content": "it"}]

    def ask(**extra: Any) -> ChatCompletion:
        return api.run(
            api.openai.chat.completions.create(
                model=api.front.model_name,
                messages=half,
                max_tokens=4,
                temperature=0,
                extra_body={"ignore_eos": True, "add_generation_prompt": False} | extra,
            )
        )

    ended, continued = ask(), ask(continue_final_message=True)
    assert ended.usage is not None and continued.usage is not None
    assert ended.usage.prompt_tokens == continued.usage.prompt_tokens + 1
    for answer, prompt in ((ended, PROMPT + "it."), (continued, PROMPT + "it")):
        expected = complete(api, prompt, max_tokens=4).choices[0].text
        assert answer.choices[0].message.content == expected


def test_a_prompt_is_cut_to_its_last_tokens(api: InProcessApi) -> None:
    cut = complete(api, extra_body={"truncate_prompt_tokens": 5}, echo=True)
    assert cut.choices[0].text == PROMPT[-5:] + complete(api, PROMPT[-5:]).choices[0].text
    assert cut.usage is not None and cut.usage.prompt_tokens == 5
    long = complete(api, [5] * 2000, extra_body={"truncate_prompt_tokens": -1}, max_tokens=1)
    assert long.usage is not None and long.usage.prompt_tokens == 511


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body, param",
    [
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"n": 0}, "n"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(
    api: InProcessApi, path: str, body: dict[str, Any], param: str
) -> None:
    text = {"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}
    response = api.post(path, **text | body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "path, body, says",
    [
        ("/v1/chat/completions", {"top_logprobs": 2}, "only allowed when logprobs is true"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "20"),
        ("/v1/chat/completions", {"best_of": 2}, "unknown field"),
        ("/v1/chat/completions", {"prompt_logprobs": 1, "stream": True}, "leave stream out"),
        ("/v1/completions", {"logprobs": 21}, "20"),
        ("/v1/completions", {"max_tokens": 0}, "needs echo"),
        ("/v1/completions", {"best_of": 2, "n": 3}, "must be at least n"),
        ("/v1/completions", {"best_of": 2, "stream": True}, "cannot wait"),
        ("/v1/completions", {"n": 2, "stream": True, "echo": True, "logprobs": 1}, "n: 1 where"),
    ],
)
def test_what_does_not_go_together_is_refused(
    api: InProcessApi, path: str, body: dict[str, Any], says: str
) -> None:
    text = {"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}
    response = api.post(path, **text | body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


def test_answers_are_what_openai_documents(api: InProcessApi) -> None:
    """Validated strictly: the client library itself would take anything."""
    body = dict(logprobs=True, top_logprobs=2, n=2, max_tokens=3)
    whole = api.post("/v1/chat/completions", messages=MESSAGES, **body).json()
    ChatCompletion.model_validate(whole, strict=True)
    body = dict(logprobs=2, n=2, max_tokens=3, echo=True)
    text = api.post("/v1/completions", prompt=PROMPT, **body).json()
    assert text["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert not any(math.isnan(x) for x in text["choices"][0]["logprobs"]["token_logprobs"][1:])
