"""The real `openai` client, against the demo model on a real Serve replica."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from ray import serve

from engine import LLM, SamplingParams
from tests.deployments.conftest import wait_until

REPEAT = [{"role": "user", "content": "Repeat these words: apple river stone"}]


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def engine_stats() -> dict[str, int]:
    return serve.get_app_handle("demo").stats.remote().result()


def is_idle() -> bool:
    stats = engine_stats()
    return stats["live"] == stats["running"] == stats["waiting"] == 0 and (
        stats["free_blocks"] == stats["num_blocks"]
    )


def test_chat_gives_the_right_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="manta-demo", messages=REPEAT, temperature=0)
    assert answer.choices[0].message.content == "apple river stone"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streams_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="manta-demo",
            messages=REPEAT,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(piece or "" for piece in pieces) == "apple river stone"
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 3


def test_async_client_gets_many_answers_at_once(server: str) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="manta-demo",
                        messages=[{"role": "user", "content": f"What is {i} + 7?"}],
                        temperature=0,
                    )
                    for i in range(8)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert [str(i + 7) in (text or "") for i, text in enumerate(asyncio.run(ask()))].count(
        True
    ) >= 7


def test_the_chat_template_takes_keyword_arguments(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="manta-demo",
        messages=[{"role": "user", "content": "What is 12 + 30?"}],
        temperature=0,
        extra_body={"chat_template_kwargs": {"enable_thinking": True}},
    )
    message = answer.choices[0].message
    assert message.content is not None and "42" in message.content
    assert message.reasoning_content  # type: ignore[attr-defined]


def test_completions_take_texts_and_token_ids_alone_or_in_lists(client: openai.OpenAI) -> None:
    llm_tokens = [5, 6, 7, 8]
    options = {"model": "manta-demo", "temperature": 0, "max_tokens": 6}
    text = client.completions.create(prompt="one two", **options)
    both = client.completions.create(prompt=["one two", "three"], **options)
    tokens = client.completions.create(prompt=llm_tokens, **options)
    token_lists = client.completions.create(prompt=[llm_tokens, [9, 10]], **options)
    assert both.choices[0].text == text.choices[0].text
    assert token_lists.choices[0].text == tokens.choices[0].text
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage is not None and both.usage.completion_tokens <= 12
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=["one two", "three"], stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in both.choices]


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="manta-demo", messages=REPEAT, temperature=0, stop=["er st"]
    )
    assert answer.choices[0].message.content == "apple riv"
    assert answer.choices[0].finish_reason == "stop"


def test_a_shard_compiles_grammars(client: openai.OpenAI) -> None:
    """It starts a process for that, which knows where the package is."""
    form = {"structured_outputs": {"regex": "(apple|pear) [a-z]{5}"}}
    answer = client.chat.completions.create(
        model="manta-demo", messages=REPEAT, temperature=0, extra_body=form
    )
    assert answer.choices[0].message.content == "apple river"
    with pytest.raises(openai.BadRequestError, match="parenthesis"):
        client.completions.create(
            model="manta-demo", prompt="a", stream=True, extra_body={"guided_regex": "(a"}
        )


def test_max_tokens_ends_with_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="manta-demo", messages=REPEAT, temperature=0, max_completion_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 2


def test_a_seed_fixes_the_text_and_no_seed_does_not(client: openai.OpenAI) -> None:
    def sample(seed: int | None) -> str:
        answer = client.completions.create(
            model="manta-demo", prompt="one", temperature=5.0, max_tokens=20, seed=seed
        )
        return answer.choices[0].text

    assert sample(3) == sample(3)
    assert sample(None) != sample(None)


def test_repeated_prompts_are_served_from_the_prefix_cache(client: openai.OpenAI) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    messages = [{"role": "user", "content": f"Repeat these words: {words}"}]
    first, second = (
        client.chat.completions.create(
            model="manta-demo", messages=messages, temperature=0, max_tokens=8
        )
        for _ in range(2)
    )
    assert first.choices[0].message.content == second.choices[0].message.content
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 64


def test_models_lists_the_one_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["manta-demo"]


def test_responses_are_what_openai_documents(server: str) -> None:
    """Validated strictly: the client library itself would take anything."""
    body = {"messages": REPEAT, "temperature": 0, "max_tokens": 4}
    chat = httpx.post(f"{server}/v1/chat/completions", json=body).json()
    ChatCompletion.model_validate(chat, strict=True)
    text = httpx.post(f"{server}/v1/completions", json={"prompt": "a", "max_tokens": 4}).json()
    Completion.model_validate(text, strict=True)
    stream = httpx.post(f"{server}/v1/chat/completions", json=body | {"stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = stream.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        _, _, data = event.rpartition("data: ")  # behind its id
        ChatCompletionChunk.model_validate(json.loads(data), strict=True)


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"tempratur": 1}, 400, "tempratur", "did you mean 'temperature'?"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"top_p": 7}, 400, "top_p", "less than or equal to 1"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", "'user'"),
        ({"messages": None}, 400, "messages", "required"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
        ({"model": "gpt-9"}, 404, "model", "'gpt-9' does not exist"),
        (
            {"messages": [{"role": "user", "content": "word " * 3000}]},
            400,
            "messages",
            "the context window is 1024 tokens",
        ),
    ],
)
def test_a_bad_request_is_refused_naming_field_and_remedy(
    server: str, body: dict[str, object], status: int, param: str | None, says: str
) -> None:
    response = httpx.post(f"{server}/v1/chat/completions", json={"messages": REPEAT} | body)
    error = response.json()["error"]
    assert response.status_code == status
    assert error["param"] == param
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_malformed_requests_get_openai_shaped_errors(server: str) -> None:
    headers = {"content-type": "application/json"}
    for response, status in (
        (httpx.post(f"{server}/v1/completions", content=b'{"prompt": "x', headers=headers), 400),
        (httpx.post(f"{server}/v1/completions", content=b"[1]", headers=headers), 400),
        (httpx.post(f"{server}/v1/completions", content=b"", headers=headers), 400),
        (httpx.post(f"{server}/v1/completions", content=b"{}"), 415),
        (httpx.get(f"{server}/v1/nothing"), 404),
        (httpx.get(f"{server}/v1/completions"), 405),
        (
            httpx.post(f"{server}/v1/completions", json={"prompt": [10**6], "max_tokens": 1}),
            400,
        ),
    ):
        assert response.status_code == status, response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def long_request(i: int) -> dict[str, object]:
    """A long answer, and a different one for each i."""
    return {
        "prompt": f"{i} one two",
        "max_tokens": 120,
        "temperature": 0.8,
        "seed": i,
        "ignore_eos": True,
    }


async def stream_text(client: httpx.AsyncClient, url: str, i: int, hang_up: bool) -> str:
    """The streamed text; who hangs up asks for a much longer one and leaves after 10 events."""
    text, count = "", 0
    body = long_request(i) | {"stream": True} | ({"max_tokens": 900} if hang_up else {})
    async with client.stream("POST", url, json=body, timeout=120) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                count += 1
            if hang_up and count == 10:
                break
    return text


def test_32_streams_equal_offline_text_and_16_gone_clients_cost_the_others_nothing(
    server: str,
) -> None:
    llm = LLM("manta-demo", dtype="float32", num_blocks=600, max_num_seqs=32, max_model_len=1024)
    wanted = [
        llm.generate(
            str(long_request(i)["prompt"]),
            SamplingParams(max_tokens=120, temperature=0.8, seed=i, ignore_eos=True),
            use_tqdm=False,
        )[0]
        .outputs[0]
        .text
        for i in range(32)
    ]

    async def all_streams(gone: int) -> list[str]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(
                *(
                    stream_text(client, f"{server}/v1/completions", i, hang_up=i < gone)
                    for i in range(32)
                )
            )

    assert asyncio.run(all_streams(gone=0)) == wanted
    wait_until(is_idle, what="every block free after 32 streams")
    before = engine_stats()["output_tokens"]
    texts = asyncio.run(all_streams(gone=16))
    assert texts[16:] == wanted[16:]
    wait_until(is_idle, what="every block free after 16 clients hung up")
    assert engine_stats()["output_tokens"] - before < 16 * 120 + 16 * 900


def test_a_plain_request_is_aborted_when_its_client_hangs_up(server: str) -> None:
    wait_until(is_idle)
    body = {"prompt": "x", "n": 64, "max_tokens": 900, "ignore_eos": True}
    before = engine_stats()["output_tokens"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server}/v1/completions", json=body, timeout=0.3)
    wait_until(is_idle, what="the aborted request's blocks are free")
    assert engine_stats()["output_tokens"] - before < 64 * 900


def test_every_answer_has_one_request_id(server: str) -> None:
    """Serve gives it one, and so does the application where there is no Serve."""
    for path, sent in (("health", {}), ("v1/models", {"x-request-id": "mine"}), ("v1/no", {})):
        (told,) = httpx.get(f"{server}/{path}", headers=sent).headers.get_list("x-request-id")
        assert told == sent.get("x-request-id", told)


def test_health_is_ok_while_the_engine_beats(server: str) -> None:
    assert httpx.get(f"{server}/health").status_code == 200
