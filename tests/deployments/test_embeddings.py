"""Embeddings, scores and rankings over HTTP, against transformers in float32."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from deployments.api.schema import answers
from tests.checkpoints import load_oracle
from tests.conftest import CheckpointFactory
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer, serve_locally
from tests.engine.small_tokenizer import one_character_each

TEXTS = ["the cat sat", "a dog", "the cat sat", "x" * 150]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[LocalServer]:
    options: dict[str, Any] = {"num_blocks": 64, "block_size": 8, "max_num_batched_tokens": 64}
    with serve_locally(
        model=str(tiny_model), served_model_name="tiny", dtype="float32", pooling="last", **options
    ) as server:
        yield server


@pytest.fixture(scope="module")
def units(server: LocalServer, tiny_model: Path) -> list[torch.Tensor]:
    """The texts' last hidden states, of length 1."""
    oracle = load_oracle(tiny_model)
    states = []
    for text in TEXTS:
        tokens = torch.tensor([server.front.tokenizer.encode(text)])
        with torch.inference_mode():
            state = oracle.model(tokens).last_hidden_state[0, -1]
        states.append(state / state.norm())
    return states


def post(server: LocalServer, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{server.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_are_those_of_transformers(
    server: LocalServer, units: list[torch.Tensor], encoding: Any
) -> None:
    with server.client() as client:
        told = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=encoding)
        default = client.embeddings.create(model="tiny", input=TEXTS)  # base64, which it decodes
    assert told.usage.total_tokens == sum(
        len(server.front.tokenizer.encode(text)) for text in TEXTS
    )
    for i, unit in enumerate(units):
        assert default.data[i].index == i
        found = torch.tensor(default.data[i].embedding)
        torch.testing.assert_close(found, unit, atol=1e-4, rtol=1e-3)
    raw = post(server, "/v1/embeddings", input=TEXTS, encoding_format=encoding)
    answers.EmbeddingList.model_validate(raw, strict=True)
    wait_until(server.is_idle)


def test_fewer_dimensions_are_the_first_ones_at_length_1(
    server: LocalServer, units: list[torch.Tensor]
) -> None:
    tokens = server.front.tokenizer.encode(TEXTS[0])
    (one,) = post(server, "/v1/embeddings", input=tokens, dimensions=8)["data"]
    cut = units[0][:8]
    found = torch.tensor(one["embedding"])
    torch.testing.assert_close(found, cut / cut.norm(), atol=1e-4, rtol=1e-3)
    assert math.isclose(float(found.norm()), 1, rel_tol=1e-5)


def test_scores_and_ranks_follow_the_angle(server: LocalServer, units: list[torch.Tensor]) -> None:
    scores = [float(units[0] @ unit) for unit in units]
    told = post(server, "/v1/score", text_1=TEXTS[0], text_2=TEXTS)
    answers.ScoreList.model_validate(told, strict=True)
    assert [entry["score"] for entry in told["data"]] == pytest.approx(scores, abs=1e-3)
    for path in ("/v1/rerank", "/rerank"):
        ranked = post(server, path, query=TEXTS[0], documents=TEXTS, top_n=3, return_documents=True)
        answers.Ranking.model_validate(ranked, strict=True)
        order = sorted(range(4), key=lambda i: -scores[i])[:3]
        assert {r["index"] for r in ranked["results"]} == set(order)
        assert ranked["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-3)
        assert ranked["results"][-1]["document"] == {"text": TEXTS[order[-1]]}


def test_a_judges_score_is_the_probability_of_yes(byte_model: Path, tmp_path: Path) -> None:
    """As Qwen's rerankers have it: of yes and no behind the question."""
    directory = tmp_path / "judge"
    shutil.copytree(byte_model, directory)
    (directory / "chat_template.jinja").write_text(
        "{{ messages | map(attribute='content') | join }}"
    )
    options: dict[str, Any] = {"num_blocks": 200, "reranker": "qwen3", "dtype": "float32"}
    with serve_locally(model=str(directory), served_model_name="judge", **options) as server:
        ranked = post(server, "/rerank", query="sea", documents=["a ship", "a stone"])
        tokenizer = server.front.tokenizer
        prompts = [
            post(
                server,
                "/tokenize",
                messages=[
                    {"role": "system", "content": _judge()},
                    {
                        "role": "user",
                        "content": "<Instruct>: Given a web search query, retrieve relevant "
                        "passages that answer the query\n\n<Query>: sea\n\n<Document>: " + text,
                    },
                ],
            )["tokens"]
            for text in ("a ship", "a stone")
        ]
        yes, no = (tokenizer.encode(word)[0] for word in ("yes", "no"))
        for body, field in (
            ({"query": "a" * 5000, "documents": ["b"]}, "query"),
            ({"query": "a", "documents": ["b", "a" * 5000]}, "documents"),
        ):
            refused = httpx.post(f"{server.url}/rerank", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    oracle = load_oracle(byte_model)
    for result in ranked["results"]:
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompts[result["index"]]])).logits[0, -1].float()
        share = float(torch.softmax(logits[[yes, no]], 0)[0])
        assert result["relevance_score"] == pytest.approx(share, abs=1e-4)


def _judge() -> str:
    from deployments.api.routes.embeddings import _JUDGE

    return _JUDGE


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 1000}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a" * 1000}, "input"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, "model"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": "a" * 1000, "text_2": "b"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "a" * 10000]}, "text_2"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a" * 1000, "documents": ["a"]}, "query"),
        ("/rerank", {"query": "a", "documents": ["b", {"text": "a" * 1000}]}, "documents"),
        ("/rerank", {"query": "", "documents": ["b"]}, "query"),
        ("/v1/completions", {"prompt": "a", "pooling": {"kind": "last"}}, "pooling"),
    ],
)
def test_what_is_refused_is_named(
    server: LocalServer, path: str, body: dict[str, Any], param: str
) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body)
    assert answer.status_code in (400, 404), answer.text
    error = answers.Error.model_validate(answer.json()).error
    assert error.param == param


def test_a_chat_model_says_that_it_has_no_embeddings(demo: LocalServer) -> None:
    with demo.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="manta-demo", input="a")
    assert "is not made for embeddings" in refused.value.message


def test_a_classifier_tells_labels(checkpoints: CheckpointFactory, tmp_path: Path) -> None:
    """Of texts, tokens and conversations, as transformers has them; and nothing else."""
    labels = {0: "bad", 1: "good", 2: "odd"}
    directory = tmp_path / "classifier"
    shutil.copytree(checkpoints("qwen3", id2label=labels, pad_token_id=0), directory)
    one_character_each().save(str(directory / "tokenizer.json"))
    template = (
        "{{ messages | map(attribute='content') | join }}{% if x is defined %}{{ x }}{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    oracle = load_oracle(directory, kind="SequenceClassification")

    def expected(server: LocalServer, text: str) -> torch.Tensor:
        with torch.inference_mode():
            return oracle(torch.tensor([server.front.tokenizer.encode(text)])).logits[0]

    options: dict[str, Any] = {"num_blocks": 64, "dtype": "float32", "served_model_name": "judge"}
    with serve_locally(model=str(directory), **options) as server:
        told = post(server, "/classify", model="judge", input=TEXTS)
        answers.Classifications.model_validate(told, strict=True)
        for text, entry in zip(TEXTS, told["data"], strict=True):
            probs = torch.softmax(expected(server, text), 0)
            assert entry["probs"] == pytest.approx(probs.tolist(), abs=1e-4)
            assert entry["label"] == labels[int(probs.argmax())] and entry["num_classes"] == 3
        messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
        asked = {"chat_template_kwargs": {"x": "!"}, "use_activation": False}
        (entry,) = post(server, "/classify", messages=messages, **asked)["data"]
        logits = expected(server, "the catsat!").tolist()
        assert entry["probs"] == pytest.approx(logits, abs=1e-3)
        for path, body, said in (
            ("/v1/completions", {"prompt": "a"}, "writes no text"),
            ("/v1/chat/completions", {"messages": messages, "stream": True}, "writes no text"),
            ("/classify", {}, "give either"),
            ("/classify", {"input": "a", "chat_template_kwargs": {}}, "only for messages"),
            ("/classify", {"input": "a" * 1000}, '"param":"input"'),
            ("/classify", {"messages": [messages[0] | {"content": "a" * 1000}]}, '"messages"'),
        ):
            answer = httpx.post(f"{server.url}{path}", json=body)
            assert answer.status_code == 400 and said in answer.text, answer.text
        wait_until(server.is_idle)


def test_a_chat_model_says_that_it_is_no_classifier(demo: LocalServer) -> None:
    answer = httpx.post(f"{demo.url}/classify", json={"input": "a"})
    assert answer.status_code == 400 and "is no classifier" in answer.text


def test_a_vector_costs_no_output_tokens(tiny_model: Path, tmp_path: Path) -> None:
    def counted(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    keys = tmp_path / "keys"
    keys.write_text("acme:sk-acme\n")
    options: dict[str, Any] = {"num_blocks": 64, "block_size": 8, "api_keys_file": str(keys)}
    with serve_locally(model=str(tiny_model), pooling="last", **options) as server:
        headers = {"authorization": "Bearer sk-acme"}
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": TEXTS}, headers=headers)
        num_prompt = answer.json()["usage"]["total_tokens"]
        wait_until(lambda: counted("vllm:prompt_tokens_total") == num_prompt)
        assert counted("vllm:generation_tokens_total") == 0
        assert counted('manta:key_tokens_total{engine="0",key="acme",kind="prompt"') == num_prompt
        assert counted('manta:key_tokens_total{engine="0",key="acme",kind="output"') == 0
