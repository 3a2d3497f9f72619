"""The API before an engine that says what a test has told it to, one token a step."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from deployments.api import build_api
from deployments.args import AppArgs
from deployments.front.arrivals import Arrivals
from deployments.front.front import Front
from deployments.front.request_options import RequestOptions
from deployments.observe.request_record import RequestRecord
from engine.sampling_params import SamplingParams
from engine.schedule.request import RequestLimits
from engine.schedule.step import TokenDelta, TokenLogprobs
from tests.engine.small_tokenizer import byte_level

TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools. {% endif %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
EOS = 2


class ScriptedApi:
    """Every request is answered with `says`, and the end of sequence."""

    def __init__(self, directory: Path, special_tokens: list[str], **args: Any) -> None:
        """
        Args:
            directory: an empty one, for the tokenizer.
        """
        tokenizer = byte_level()
        tokenizer.add_special_tokens(special_tokens)
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "chat_template.jinja").write_text(TEMPLATE)
        self.says = ""
        self.is_ahead = False  # all steps come before the first is read
        self.num_made = 0  # tokens of the last request that the engine has made
        self.finish_reason: str | None = None  # on the last request's record
        self.args = AppArgs(model=str(directory), **args)
        self.front = Front(self.args)
        self.front.client.limits = RequestLimits(1000, 2000, 1000, 16)
        self.front.client.start = self._start  # type: ignore[assignment]
        self.front.client.leave = self._leave  # type: ignore[assignment]
        self.app = build_api(self.front, self.args)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://test"
        )

    def _start(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        options: RequestOptions,
        record: RequestRecord,
        arrivals: Arrivals,
        index: int = 0,
    ) -> tuple[RequestRecord, "asyncio.Task[None]"]:
        async def generate() -> None:
            for start in range(0, len(tokens), step):
                self.num_made = start + step
                made = tokens[start : start + step]
                logprobs = [TokenLogprobs(1, [token], [-1.0]) for token in made]
                if start + step == len(tokens):
                    record.finish_reason = "stop" if tokens[-1] == EOS else "length"
                arrivals.put(
                    index,
                    TokenDelta(
                        request_id="0",
                        token_ids=made,
                        finish_reason=record.finish_reason,
                        logprobs=logprobs if params.logprobs is not None else None,
                    ),
                )
                while not self.is_ahead and arrivals._deltas:  # until it is read
                    await asyncio.sleep(0)

        tokens = [*self.front.tokenizer.encode(self.says), EOS][: params.max_tokens]
        self.num_made = 0
        step = 1 if options.stream else len(tokens)
        return record, asyncio.create_task(generate())

    def _leave(self, live: tuple[RequestRecord, "asyncio.Task[None]"]) -> None:
        record, task = live
        task.cancel()
        self.finish_reason = record.finish_reason

    async def chat(self, **options: Any) -> dict[str, Any]:
        """The one choice of an answer, whole, or put together if it is streamed."""
        messages = [{"role": "user", "content": "hi"}]
        answer = await self.http.post(
            "/v1/chat/completions", json={"messages": messages, "temperature": 0} | options
        )
        assert answer.status_code == 200, answer.text
        if not options.get("stream"):
            (choice,) = answer.json()["choices"]
            return dict(choice)
        message: dict[str, Any] = {"content": ""}
        lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        for line in lines:
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            delta = choice["delta"]
            for name in delta.keys() & {"content", "reasoning_content"}:
                message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if "id" in call:
                    calls.append(call)
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        return dict(choice) | {"message": message}
