"""What a request costs others: a refusal costs little however large it is, and no work on texts is
done on the event loop, where every stream would wait for it.

Bounds in seconds are far above what these take, and far below what they took when costs grew with
what was wrong.
"""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.api.bodies import read
from deployments.api.errors import ApiError
from deployments.api.schema import answers
from deployments.api.schema.completion_request import CompletionRequest
from deployments.api.schema.openai_logprobs import chat_logprobs
from deployments.api.schema.protocol import ChatCompletionRequest, ModelRequest
from deployments.api.schema.responses.request import ResponseRequest
from deployments.api.streaming import start_all
from deployments.api.whole import _pieces
from engine.sampling_params import SamplingParams
from engine.strict import explain
from engine.text.chat_template import ChatTemplates
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MB = 10**6


def send(server: LocalServer, path: str, body: bytes) -> httpx.Response:
    return httpx.post(
        f"{server.url}{path}",
        content=body,
        headers={"content-type": "application/json"},
        timeout=120,
    )


def filled(template: str, item: str, size: int) -> bytes:
    """The template with so many bytes of one item, again and again, where it says ITEMS."""
    return template.replace("ITEMS", ",".join([item] * (size // (len(item) + 1)))).encode()


def unknown_fields(number: int) -> bytes:
    return json.dumps({"prompt": "a"} | {f"temperatur{i}": 1 for i in range(number)}).encode()


# Refusals


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, filled('{"prompt": [ITEMS, "a"]}', "1", MB)),
        (TEXT, filled('{"prompt": [ITEMS, "a"]}', "1", 16 * MB)),
        (TEXT, filled('{"prompt": [ITEMS]}', '{"a": 1}', 16 * MB)),
        (TEXT, filled('{"prompt": [ITEMS]}', "9" * 4000, 16 * MB)),
        (TEXT, filled('{"prompt": "a", "guided_choice": [ITEMS]}', "1", MB)),
        (TEXT, unknown_fields(50_000)),
        (TEXT, json.dumps({"prompt": "a", "x" * 15 * MB: 1}).encode()),
        (TEXT, json.dumps({"prompt": "a", "model": "x" * 15 * MB}).encode()),
        (CHAT, filled('{"messages": [ITEMS]}', "1", MB)),
        (CHAT, filled('{"messages": [ITEMS]}', "{}", 16 * MB)),
        (CHAT, filled('{"messages": [{"role": "user", "content": [ITEMS]}]}', "{}", MB // 8)),
        (RESPONSES, filled('{"input": [ITEMS]}', '{"type": "x"}', MB // 8)),
    ],
    ids=lambda value: f"{value[:24].decode()}-{len(value)}" if isinstance(value, bytes) else None,
)
def test_a_refusal_is_quick_and_short(demo: LocalServer, path: str, body: bytes) -> None:
    began = time.monotonic()
    answer = send(demo, path, body)
    assert time.monotonic() - began < 5
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 10_000
    answers.Error.model_validate_json(answer.content)
    wait_until(demo.is_idle)


@pytest.mark.parametrize(
    ("model", "content", "field"),
    [
        (CompletionRequest, {"prompt": [1] * 1000 + ["a"] * 1000}, "prompt.token ids.1000"),
        (CompletionRequest, {"prompt": ["a"] + [1] * 1000}, "prompt.texts.1"),
        (CompletionRequest, {"prompt": [[1]] + [["a"]] * 9}, "prompt.lists of token ids.1.0"),
        (ChatCompletionRequest, {"messages": [{"x": 1}] * 1000}, "messages.0.x"),
        (SamplingParams, {"logit_bias": {f"a{i}": "b" for i in range(1000)}}, "logit_bias.a0"),
        (SamplingParams, {"bad_words_token_ids": [["a"] * 9] * 9}, "bad_words_token_ids.0.0"),
        (SamplingParams, {"structured_outputs": {"choice": [1] * 9}}, "structured_outputs.choice"),
        (ResponseRequest, {"input": "a", "metadata": dict.fromkeys("abc", 1)}, "metadata.a"),
    ],
)
def test_the_first_bad_item_is_the_only_fault(
    model: Any, content: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(content)
    ((name, _),) = explain(caught.value.errors())
    assert name.startswith(field)


def test_few_unknown_fields_are_explained() -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**{f"temperatur{i}": 1 for i in range(1000)})
    faults = explain(caught.value.errors())
    assert len(faults) == 5
    assert faults[0] == ("temperatur0", "unknown field, did you mean 'temperature'? (got 1)")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([1] * MB, "[1, 1, 1, "),
        ({"a" * MB: {"b": [[[1]]]}}, "{'aaa"),
        ({str(i): "x" * MB for i in range(1000)}, "{'0': 'xxx"),
        ([["x" * MB] * 1000] * 1000, "[['xxx"),
    ],
)
def test_of_a_value_the_beginning_is_shown(value: Any, shown: str) -> None:
    fault = {"loc": ("field",), "msg": "wrong", "type": "x", "input": value}
    ((_, message),) = explain([fault])
    assert message.startswith(f"wrong (got {shown}")
    assert len(message) < 150


# What a body may hold

LIMIT = 2**19  # numbers


def parse(body: str) -> ModelRequest:
    return read(CompletionRequest, body.encode(), max_bytes=MB)


def test_values_are_limited_and_numbers_least() -> None:
    numbers = ",".join(["1"] * (LIMIT - 40))
    assert parse(f'{{"prompt": [{numbers}]}}')
    for too_many in (f"[{numbers}{',1' * 40}]", f"[{','.join(['[]'] * (LIMIT // 8))}]"):
        with pytest.raises(ApiError, match="524288 numbers are read") as caught:
            parse(f'{{"prompt": {too_many}}}')
        assert caught.value.status == 400


@pytest.mark.parametrize("text", ['{"a": [1, 2]}, ', "\\", '"', '\\"', "9" * 200 + " ", "é\n"])
def test_what_is_in_a_text_is_no_value(text: str) -> None:
    prompt = text * (200_000 // len(text))
    assert parse(json.dumps({"prompt": prompt})).prompt == prompt  # type: ignore[attr-defined]


def test_a_number_has_few_digits() -> None:
    padding = " " * 40_000  # small bodies are not looked through
    assert parse(f'{{"prompt": [1], "seed": {"9" * 18}}}{padding}')
    with pytest.raises(ApiError, match="less than 100 digits"):
        parse(f'{{"prompt": [{"9" * 100}]}}{padding}')


def test_a_byte_order_mark_is_no_fault() -> None:
    assert parse('\ufeff{"prompt": "a"}')


# Off the event loop


class RunsOfLetters:
    """A tokenizer whose tokens are runs of up to 100 of the same letter."""

    def __init__(self) -> None:
        self.looked_at: list[int] = []

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        self.looked_at += map(len, texts)
        runs = re.findall(r"((.)\2{0,99})", texts[0])
        ids = [ord(letter) for _, letter in runs]
        return [type("Encoding", (), {"ids": ids, "__len__": lambda _: len(ids)})()]


def test_of_a_text_that_is_too_long_only_the_beginning_is_tokenized() -> None:
    tokenizer = object.__new__(Tokenizer)
    tokenizer.fast, tokenizer.longest_token = (runs := RunsOfLetters()), 100
    for text, looked_at in (("word" * 24_000, [16_000]), ("a" * 100_001, [])):
        with pytest.raises(ValueError, match=r"characters, more than fit a window of 1000 tokens"):
            tokenizer.encode(text, max_len=1000)
        assert runs.looked_at == looked_at
        runs.looked_at.clear()
    assert tokenizer.encode("a" * 100_000, max_len=1000) == [ord("a")] * 1000


def ticks_during(work: Callable[[], object]) -> int:
    """How often another thread gets to run meanwhile."""
    began = threading.Event()

    def run() -> None:
        began.set()
        work()

    thread = threading.Thread(target=run)
    thread.start()
    began.wait()
    ticks = 0
    while thread.is_alive():
        ticks += 1
        time.sleep(0)
    return ticks


def test_tokenizing_lets_others_run(demo: LocalServer) -> None:
    tokenizer = demo.front.tokenizer
    text = "word apple river stone 12 " * 40_000
    assert ticks_during(lambda: tokenizer.encode(text)) > 100
    tokens = [300] * 1_000_000
    assert ticks_during(lambda: tokenizer.decode(tokens)) > 100


def test_no_text_is_worked_on_in_the_event_loop(
    demo: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = {"encode": Tokenizer, "decode": Tokenizer, "render": ChatTemplates}
    owners["push"] = Detokenizer
    seen: dict[str, set[str]] = {name: set() for name in owners}
    for name, threads in seen.items():
        owner: Any = owners[name]
        method = getattr(owner, name)

        def watched(
            self: Any,
            first: Any,
            *rest: Any,
            _method: Any = method,
            _threads: set[str] = threads,
            **options: Any,
        ) -> Any:
            if len(first) > 20 or _method.__name__ == "render":  # not the end of a prompt
                _threads.add(threading.current_thread().name)
            return _method(self, first, *rest, **options)

        monkeypatch.setattr(owner, name, watched)
    text = "these are more words than a few, and so worth a thread of their own"
    tokens = demo.front.tokenizer.fast.encode(text).ids
    messages = [{"role": "user", "content": text}]
    begun = {"seed": 1, "token_ids": tokens * 3}
    num_known = len(tokens) * 3
    for path, body in [
        (TEXT, {"prompt": text, "max_tokens": 1}),
        (TEXT, {"prompt": tokens * 3, "max_tokens": 1, "echo": True}),
        (CHAT, {"messages": messages, "max_tokens": 1}),
        (CHAT, {"messages": messages, "stream": True, "resume": begun, "max_tokens": num_known}),
        (RESPONSES, {"input": messages, "max_output_tokens": 1}),
        ("/tokenize", {"messages": messages}),
        ("/tokenize", {"prompt": text}),
        ("/detokenize", {"tokens": tokens * 3}),
    ]:
        answer = send(demo, path, json.dumps(body).encode())
        assert answer.status_code == 200, answer.text
    assert all(seen.values())
    assert "front" not in set.union(*seen.values())


# Answers


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(), parts, max_size=4),
    max_leaves=40,
)


@given(JSON, st.integers(0, 5))
def test_json_in_pieces_is_json(value: Any, depth: int) -> None:
    assert json.loads("".join(_pieces(value, depth))) == value


def test_a_large_answer_is_put_together_and_written_elsewhere_in_pieces(
    demo: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, longest = set(), 0

    def pieces(content: Any, depth: int) -> Iterator[str]:
        nonlocal longest
        threads.add(threading.current_thread().name)
        for piece in _pieces(content, depth):
            longest = max(longest, len(piece))
            yield piece

    def listed(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return chat_logprobs(*args)

    monkeypatch.setattr("deployments.api.whole._pieces", pieces)
    monkeypatch.setattr("deployments.api.routes.chat.chat_logprobs", listed)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100, "n": 4}
    body |= {"ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    answer = send(demo, CHAT, json.dumps(body).encode()).json()
    assert [len(choice["logprobs"]["content"]) for choice in answer["choices"]] == [100] * 4
    assert threads and "front" not in threads
    assert longest < 10_000


def test_choices_are_begun_a_few_at_a_time() -> None:
    """Beginning a thousand is a tenth of a second, in which others run too."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def choice() -> int:
        return turns

    async def run() -> list[int]:
        other = asyncio.create_task(others())
        begun = await asyncio.gather(*await start_all(choice() for _ in range(100)))
        other.cancel()
        return begun

    assert len(set(asyncio.run(run()))) >= 100 // 16
