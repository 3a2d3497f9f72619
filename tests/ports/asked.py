"""A live server of the demo model, and short ways to ask it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.deployments.local_server import LocalServer, serve_locally

Check = Callable[["Asked"], object]
KEY = "sk-behaviours"
WORDS = "Repeat these words: apple river stone"
USER = [{"role": "user", "content": WORDS}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "Get the current weather in a city."}
TOOLS = [{"type": "function", "function": TOOL | {"parameters": CITY}}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
FORM = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY}}
CLAUDE = [TOOL | {"input_schema": CITY}]
FLAT = [{"type": "function", **TOOL, "parameters": CITY}]
THOUGHT = {"continue_final_message": True, "add_generation_prompt": False}


@dataclass(frozen=True)
class Asked:
    """A server, and ways to ask it."""

    url: str
    server: LocalServer

    def send(self, path: str, method: str = "POST", **body: Any) -> httpx.Response:
        headers = body.pop("headers", {"authorization": f"Bearer {KEY}"})
        content = {"json": body} if method == "POST" else {}
        return httpx.request(method, f"{self.url}{path}", headers=headers, timeout=120, **content)

    def post(self, path: str, **body: Any) -> Any:
        answer = self.send(path, **body)
        assert answer.status_code == 200, answer.text[:300]
        return answer.json()

    def get(self, path: str) -> Any:
        answer = self.send(path, "GET")
        assert answer.status_code == 200, answer.text[:300]
        return answer.json()

    def refused(self, path: str, *words: str, status: int = 400, **body: Any) -> bool:
        answer = self.send(path, **body)
        return answer.status_code == status and all(word in answer.text for word in words)

    def chat(self, messages: Any = USER, **body: Any) -> Any:
        body = {"temperature": 0, "max_tokens": 60} | body
        return self.post("/v1/chat/completions", messages=messages, **body)

    def said(self, messages: Any = USER, **body: Any) -> Any:
        return self.chat(messages, **body)["choices"][0]["message"]

    def text(self, prompt: Any = "one two", **body: Any) -> Any:
        body = {"temperature": 0, "max_tokens": 8} | body
        return self.post("/v1/completions", prompt=prompt, **body)

    def events(self, path: str, **body: Any) -> list[Any]:
        answer = self.send(path, stream=True, **body)
        assert answer.status_code == 200, answer.text[:300]
        lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        found = [line.removeprefix("data: ") for line in lines]
        return [json.loads(line) if line != "[DONE]" else line for line in found]

    def chunks(self, messages: Any = USER, **body: Any) -> list[Any]:
        body = {"temperature": 0, "max_tokens": 60} | body
        return self.events("/v1/chat/completions", messages=messages, **body)

    def respond(self, given: Any = WORDS, **body: Any) -> Any:
        body = {"temperature": 0, "max_output_tokens": 80} | body
        return self.post("/v1/responses", input=given, **body)

    def message(self, messages: Any = USER, **body: Any) -> Any:
        body = {"model": "manta-demo", "max_tokens": 80, "temperature": 0} | body
        return self.post("/v1/messages", messages=messages, **body)

    def message_events(self, messages: Any = USER, **body: Any) -> list[Any]:
        body = {"model": "manta-demo", "max_tokens": 80, "temperature": 0} | body
        return self.events("/v1/messages", messages=messages, **body)


def joined(chunks: list[Any], field: str = "content") -> str:
    deltas = [c["choices"][0]["delta"] for c in chunks if c != "[DONE]" and c["choices"]]
    return "".join(delta.get(field) or "" for delta in deltas)


def call_of(message: Any) -> Any:
    return json.loads(message["tool_calls"][0]["function"]["arguments"])


def is_error(answer: httpx.Response, status: int) -> bool:
    error = answer.json()["error"]
    return answer.status_code == status and {"message", "type", "param", "code"} <= error.keys()


def history(content: Any, arguments: Any = '{"city": "Paris"}', **more: Any) -> list[Any]:
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "get_weather", "arguments": arguments}  # type: ignore[assignment]
    called = {"role": "assistant", "content": None, "tool_calls": [call], **more}
    return [*WEATHER, called, {"role": "tool", "tool_call_id": "call_1", "content": content}]


def results(content: Any, *more: Any, **fields: Any) -> list[Any]:
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": content, **fields}
    asked = {"role": "assistant", "content": [use]}
    return [*WEATHER, asked, {"role": "user", "content": [result, *more]}]


@contextmanager
def live(directory: str) -> Iterator[Asked]:
    """The demo model, which also embeds here, with a key and a place for files."""
    os.environ["MANTA_API_KEYS"] = f"test:{KEY}"
    try:
        with serve_locally(
            max_model_len=1024,
            num_blocks=300,
            enable_sleep_mode=True,
            pooling="last",
            files_directory=directory,
            allowed_origins=["https://app.example"],
        ) as server:
            yield Asked(server.url, server)
    finally:
        del os.environ["MANTA_API_KEYS"]
