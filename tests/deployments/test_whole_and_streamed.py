"""An answer is the same whole and streamed, as the clients put its stream together."""

import asyncio
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from tests.deployments.scripted import ScriptedApi

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
ASKED: Any = [{"role": "user", "content": "hi"}]
OWN = {"id", "call_id", "created", "created_at"}  # of every answer


def call(city: str, end: str = '"}}\n</tool_call>\n') -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}{end}'


THOUGHTS = "<think>\nTwo cities.\n</think>\n\n"
SAYS = {
    "text": "It rains.",
    "thoughts": f"{THOUGHTS}It rains.",
    "thoughts only": "<think>\nWhich city?",
    "a call": f"I look. {call('Paris')}",
    "two calls": f"{THOUGHTS}{call('Paris')}{call('Lima')}",
    "text between calls": f"{call('Paris')}And there? {call('Lima')}",
    "a call that is cut": f"{call('Paris')}{call('Lim', end='')}",
}


async def chat(api: ScriptedApi) -> tuple[Any, Any]:
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=api.http)
    function = {"name": "weather", "parameters": SCHEMA}
    asked: Any = {"model": api.front.model_name, "messages": ASKED}
    asked["tools"] = [{"type": "function", "function": function}]
    whole = await client.chat.completions.create(**asked)
    options: Any = {"stream_options": {"include_usage": True}}
    async with client.chat.completions.stream(**asked, **options) as stream:
        return whole, await stream.get_final_completion()


async def response(api: ScriptedApi) -> tuple[Any, Any]:
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=api.http)
    asked: Any = {"model": api.front.model_name, "input": ASKED}
    asked["tools"] = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
    whole = await client.responses.create(**asked)
    async with client.responses.stream(**asked) as stream:
        return whole, await stream.get_final_response()


async def message(api: ScriptedApi) -> tuple[Any, Any]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(api.app))
    client = anthropic.AsyncAnthropic(base_url="http://test", api_key="none", http_client=http)
    asked: Any = {"model": api.front.model_name, "messages": ASKED, "max_tokens": 500}
    asked["tools"] = [{"name": "weather", "input_schema": SCHEMA}]
    whole = await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        return whole, await stream.get_final_message()


def told(answer: Any) -> Any:
    """What an answer says, without what each has of its own and what the client has made of it."""
    if isinstance(answer, dict):
        kept = answer.keys() - OWN - {"parsed", "parsed_arguments", "index"}
        return {key: told(answer[key]) for key in kept if answer[key] not in (None, "")}
    return [told(item) for item in answer] if isinstance(answer, list) else answer


@pytest.mark.parametrize("ask", [chat, response, message])
@pytest.mark.parametrize("says", SAYS)
def test_whole_as_streamed(tmp_path: Path, ask: Any, says: str) -> None:
    async def run() -> None:
        api = ScriptedApi(tmp_path, [], tool_parser="hermes", reasoning_parser="think")
        api.says = SAYS[says]
        whole, streamed = await ask(api)
        assert told(whole.to_dict()) == told(streamed.to_dict())
        for word in {"Paris", "Lima", "rains"} & set(SAYS[says].replace('"', " ").split()):
            assert word in whole.to_json()

    asyncio.run(run())
