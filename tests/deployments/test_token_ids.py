"""A checkpoint without a tokenizer is served by token ids alone."""

from collections.abc import Iterator

import pytest

from tests.conftest import CheckpointFactory
from tests.deployments.in_process import InProcessApi, serve_in_process


@pytest.fixture(scope="module")
def api(checkpoints: CheckpointFactory) -> Iterator[InProcessApi]:
    with serve_in_process(str(checkpoints("qwen3"))) as api:
        yield api


def test_token_ids_are_completed_with_token_ids(api: InProcessApi) -> None:
    body = dict(prompt=[5, 9, 7], max_tokens=4, temperature=0, ignore_eos=True)
    answer = api.post("/v1/completions", **body, return_token_ids=True, logprobs=1).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "" and choice["prompt_token_ids"] == [5, 9, 7]
    assert len(choice["token_ids"]) == 4 and answer["usage"]["completion_tokens"] == 4
    names = [f"token_id:{token}" for token in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names
    streamed = api.post("/v1/completions", **body, return_token_ids=True, stream=True).text
    assert str(choice["token_ids"][-1]) in streamed and "[DONE]" in streamed


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", dict(prompt="a text", max_tokens=2)),
        ("/v1/completions", dict(prompt=[5], max_tokens=2, stop=["."])),
        ("/v1/completions", dict(prompt=[5], max_tokens=2, bad_words=["no"])),
        ("/v1/chat/completions", dict(messages=[dict(role="user", content="Hi")])),
        ("/tokenize", dict(prompt="a text")),
        ("/detokenize", dict(tokens=[5])),
    ],
)
def test_what_needs_text_is_refused_with_the_reason(
    api: InProcessApi, path: str, body: dict[str, object]
) -> None:
    answer = api.post(path, **body)
    assert answer.status_code == 400
    assert "tokenizer" in answer.json()["error"]["message"]
    api.assert_idle()


def test_there_is_nothing_to_tell_of_a_tokenizer(api: InProcessApi) -> None:
    answer = api.run(api.http.get("/tokenizer_info"))
    assert answer.status_code == 404
    assert "tokenizer" in answer.json()["error"]["message"]
