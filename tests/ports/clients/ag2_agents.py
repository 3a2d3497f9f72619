"""ag2's agents: chats, responses and messages, whole and streamed; a tool, and a second turn."""

import asyncio
import sys

from ag2 import Agent, tool
from ag2.config import AnthropicConfig, OpenAIConfig, OpenAIResponsesConfig

url = sys.argv[1]


@tool
def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return '{"temperature": 21, "condition": "sunny"}'


async def main() -> None:
    openai = {"model": "manta-demo", "base_url": f"{url}/v1", "api_key": "none", "temperature": 0}
    claude = openai | {"base_url": url, "max_tokens": 200}
    for kind, base in (
        (OpenAIConfig, openai),
        (OpenAIResponsesConfig, openai),
        (AnthropicConfig, claude),
    ):
        for streaming in (False, True):
            agent = Agent("helper", config=kind(**base, streaming=streaming), tools=[get_weather])
            reply = await agent.ask("What is the weather in Paris?")
            assert "21" in str(reply.body), reply.body
            again = await reply.ask("Repeat these words: sea")
            print(kind.__name__, streaming, repr(reply.body), repr(again.body))


asyncio.run(main())
