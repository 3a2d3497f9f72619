"""What the keys' file says that a client may have, and what it is told who wants more."""

import asyncio
import json
import logging
from pathlib import Path

import pytest

from deployments.api.keys import ApiKeysError, KeyRing
from deployments.api.request_log import LOGGER
from deployments.front.quotas import Quota, QuotaError, Quotas
from tests.deployments.in_process import serve_in_process
from tests.deployments.routing_fleet import Clock
from tests.deployments.scripted import ScriptedApi

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_a_line_has_a_key_and_its_limits() -> None:
    ring = KeyRing(
        [
            "acme corp:sk-1 weight=2.5 tokens_per_minute=6000",
            "acme corp:sk-2  weight=2.5  tokens_per_minute=6000 ",
            "sk-3==\tmax_concurrent=8",
            "plain:sk-4",
        ]
    )
    keys = ("sk-1", "sk-2", "sk-3==", "sk-4", "sk-5")
    names = [ring.find({"authorization": f"Bearer {key}"}) for key in keys]
    assert names == ["acme corp", "acme corp", "key-3", "plain", None]
    assert ring.quota("acme corp") == Quota(weight=2.5, tokens_per_minute=6000)
    assert ring.quota("key-3") == Quota(max_concurrent=8)
    assert ring.quota("plain") == Quota()


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        (["a:sk wieght=2"], "API key 1: wieght: unknown field, did you mean 'weight'?"),
        (["a:sk weight=0"], "API key 1: weight: .* greater than 0"),
        (["a:sk max_concurrent=1.5"], "API key 1: max_concurrent: .* integer"),
        (["a:s1 weight=2", "a:s2"], "API key 2: 'a' has other limits with another key"),
        (["a:sk weight = 2"], "API key 1: white space"),
        (["a:sk # the first"], "API key 1: white space"),
        (["a:sk", "b:sk"], "API key 2: is that of 'a', too"),
    ],
)
def test_lines_that_cannot_be_meant_are_named(entries: list[str], fault: str) -> None:
    with pytest.raises(ApiKeysError, match=fault):
        KeyRing(entries)


def test_tokens_come_back_over_a_minute() -> None:
    clock = Clock()
    quotas, quota = Quotas(clock), Quota(tokens_per_minute=600)

    def retry_after() -> int:
        try:
            with quotas.request("a", quota):
                return 0
        except QuotaError as error:
            return error.retry_after_s

    quotas.take("a", quota, 500)
    assert retry_after() == 0
    quotas.take("a", quota, 400)  # more than was left: what is owed is waited for
    assert retry_after() == 30
    clock.now += 29
    assert retry_after() == 1
    clock.now += 1.5
    assert retry_after() == 0
    with quotas.request("b", quota):  # another's are its own
        pass


def test_who_has_had_enough_gets_429_and_nobody_else(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(
        "acme:sk-a tokens_per_minute=12\nglobex:sk-g max_concurrent=1\nfree:sk-f\n"
        "late:sk-l tokens_per_minute=12\n"
    )
    model = tmp_path / "model"
    model.mkdir()
    api = ScriptedApi(model, [], api_keys_file=str(keys))
    api.says = "hello"

    async def ask(key: str) -> tuple[int, str, str | None]:
        headers = {"authorization": f"Bearer {key}"}
        answer = await api.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        code = answer.json().get("error", {}).get("code", "")
        return answer.status_code, code, answer.headers.get("retry-after")

    async def run() -> None:
        for _ in range(7):  # of two tokens, for no engine counts the others here
            assert (await ask("sk-a"))[0] == 200
        status, code, retry_after = await ask("sk-a")
        assert (status, code) == (429, "rate_limit_exceeded")
        assert retry_after is not None and 5 <= int(retry_after) <= 10
        answers = await asyncio.gather(ask("sk-g"), ask("sk-g"), ask("sk-f"), ask("sk-f"))
        assert sorted(status for status, _, _ in answers) == [200, 200, 200, 429]
        assert (await ask("sk-g"))[0] == 200
        begun = {"stream": True, "resume": {"seed": 1, "token_ids": [5] * 20}}  # costs as a prompt
        auth = {"authorization": "Bearer sk-l"}
        answer = await api.http.post("/v1/chat/completions", json=CHAT | begun, headers=auth)
        assert answer.status_code == 200 and (await ask("sk-l"))[0] == 429
        metrics = (await api.http.get("/metrics")).text
        assert 'manta:key_tokens_total{engine="0",key="free",kind="prompt",' in metrics

    asyncio.run(run())


def test_a_key_is_counted_what_its_answers_usage_says(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt once, however many choices it has."""
    keys = tmp_path / "keys"
    keys.write_text("acme:sk-acme tokens_per_minute=1000\n")
    with serve_in_process(str(tiny_model), api_keys_file=str(keys)) as api:
        logging.getLogger(LOGGER).addHandler(caplog.handler)
        api.http.headers["authorization"] = "Bearer sk-acme"
        asked = {"prompt": ["a cat", "a dog"], "n": 3, "max_tokens": 4, "ignore_eos": True}
        usage = api.post("/v1/completions", **asked).json()["usage"]
        logging.getLogger(LOGGER).removeHandler(caplog.handler)
        api.assert_idle()
    kinds = ("prompt", "cached", "output")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    told = [usage["prompt_tokens"], cached, usage["completion_tokens"]]
    assert told == [10, 0, 24]
    assert [api.front.client.metrics.key_tokens["acme", kind] for kind in kinds] == told
    line = json.loads(caplog.messages[-1])
    assert [line[f"{kind}_tokens"] for kind in kinds] == told
