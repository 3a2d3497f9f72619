"""haystack's Agent, over chats and responses: a tool whose output it sends back, and streams."""

import sys

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import tool
from haystack.utils import Secret

url = sys.argv[1]


@tool
def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return '{"temperature": 21, "condition": "sunny"}'


for kind in (OpenAIChatGenerator, OpenAIResponsesChatGenerator):
    for streams in (False, True):
        heard = []
        generator = kind(
            api_key=Secret.from_token("none"),
            model="manta-demo",
            api_base_url=f"{url}/v1",
            generation_kwargs={"temperature": 0},
            streaming_callback=heard.append if streams else None,
        )
        agent = Agent(chat_generator=generator, tools=[get_weather])
        said = agent.run(messages=[ChatMessage.from_user("What is the weather in Paris?")])
        text = said["messages"][-1].text
        assert "21" in text and bool(heard) == streams, said
        print(kind.__name__, len(heard), "chunks", repr(text))
