"""Requests made from the OpenAPI document, right and wrong: whatever comes, there is an answer.

A short run by default; a long one:
MANTA_FUZZ_CASES=2000 python -m pytest -s tests/deployments/test_fuzz.py
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies
import pytest
import requests
import schemathesis
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.api.schema import answers, message_answers
from tests.conftest import CheckpointFactory
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer, serve_locally
from tests.engine.small_tokenizer import one_character_each

CASES = int(os.environ.get("MANTA_FUZZ_CASES", "150"))
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
NO_HANG_S = 30


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    """The demo model with a window so short that no request takes long."""
    with serve_locally(
        max_model_len=96, num_blocks=64, max_num_seqs=16, request_log="off"
    ) as server:
        yield server


def check(case: Case, server: LocalServer, session: requests.Session) -> int:
    """Sends it and looks at what comes; returns the status."""
    response = case.call(base_url=server.url, session=session, timeout=NO_HANG_S)
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400:
        shape = message_answers.AnthropicError if "/messages" in case.path else answers.Error
        shape.model_validate_json(response.content)
    return response.status_code


def make_sensible(case: Case) -> Case:
    """What a document cannot say: which model is served, who may say what, how long it may take."""
    body = case.body
    if not isinstance(body, dict):
        return case
    body.pop("timeout", None)
    body.pop("resume", None)
    body.pop("priority", None)
    if "model" in body:
        body["model"] = "manta-demo"
    if isinstance(body.get("messages"), list):
        body["messages"] = [
            {"role": "user", "content": message.get("content") or "hi"}
            for message in body["messages"]
        ]
    if "prompt" in body:
        body["prompt"] = "hi"
        body.pop("min_tokens", None)
    if "messages" in body and "prompt" in body:
        del body["prompt"]
    for name in ("prompt", "tokens"):
        if isinstance(body.get(name), list):
            body[name] = [x % 100 if isinstance(x, int) else x for x in body[name]]
    for name in ("logit_bias", "chat_template_kwargs", "tools", "tool_choice", "min_tokens"):
        body.pop(name, None)
    return case


def fuzz(
    strategy: hypothesis.strategies.SearchStrategy[Case],
    number: int,
    send: Callable[[Case], None],
) -> None:
    @hypothesis.settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=strategy)
    def run(case: Case) -> None:
        send(case)

    run()


def fuzz_all(server: LocalServer, num_cases: int, paths: Sequence[str] = ()) -> None:
    """Every operation, or those below these paths; then nothing is left and all is well."""
    document = requests.get(f"{server.url}/openapi.json", timeout=NO_HANG_S).json()
    found = [each.ok() for each in schemathesis.openapi.from_dict(document).get_all_operations()]
    operations = [each for each in found if each.path.startswith(tuple(paths or ["/"]))]
    posts = [operation for operation in operations if "requestBody" in operation.definition.raw]
    number = num_cases // (3 * len(posts)) + 1  # each in three ways
    seen: Counter[tuple[str, int]] = Counter()
    with requests.Session() as session:
        for operation in operations:

            def send(case: Case, path: str = operation.path) -> None:
                seen[path, check(case, server, session)] += 1

            right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
            fuzz(right, number, send)
            if operation in posts:
                fuzz(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), number, send)
                fuzz(right.map(make_sensible), number, send)
    for (path, status), number in sorted(seen.items()):
        print(f"{path} {status}: {number}")
    print(f"{sum(seen.values())} cases")
    assert sum(seen.values()) >= num_cases
    for operation in posts:
        if "text/event-stream" in str(operation.definition.raw["responses"]["200"]):
            assert seen[operation.path, 200] > 0, f"some must make sense: {operation.path}"
    wait_until(server.is_idle, what="no block is held")


@pytest.mark.timeout(3600)
def test_any_request_has_an_answer_and_leaves_nothing_behind(server: LocalServer) -> None:
    fuzz_all(server, CASES)
    with server.client() as client:
        answer = client.chat.completions.create(
            model="manta-demo",
            messages=[{"role": "user", "content": "Repeat these words: apple river"}],
            temperature=0,
        )
    assert answer.choices[0].message.content == "apple river"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_request_of_agents_has_an_answer(
    checkpoints: CheckpointFactory, tmp_path: Path
) -> None:
    """Where there are files and embeddings, and on a classifier: 2,000 and more."""
    options: dict[str, Any] = {"num_blocks": 64, "max_num_seqs": 16, "request_log": "off"}
    with serve_locally(
        max_model_len=96, pooling="last", files_directory=str(tmp_path / "files"), **options
    ) as server:
        of_texts = ["/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/score"]
        others = ["/v1/rerank", "/rerank", "/v1/files", "/v1/batches", "/tokenizer_info"]
        others += ["/load", "/ping", "/ready", "/start_profile", "/stop_profile"]
        others += ["/sleep", "/wake_up", "/is_sleeping"]
        fuzz_all(server, 1700, [*of_texts, *others])
    directory = tmp_path / "classifier"
    shutil.copytree(checkpoints("qwen3", num_labels=3, pad_token_id=0), directory)
    one_character_each().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    with serve_locally(
        model=str(directory), served_model_name="manta-demo", pooling="last", **options
    ) as server:
        fuzz_all(server, 400, ["/classify", "/v1/embeddings"])
