"""openai-agents, with both of its models: tools, streams, and sessions on the server."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

url = sys.argv[1]
set_tracing_disabled(True)


@function_tool
def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return '{"temperature": 21, "condition": "sunny"}'


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for model in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        agent = Agent(
            name="helper",
            model=model("manta-demo", client),
            model_settings=ModelSettings(temperature=0),
            tools=[get_weather],
        )
        whole = await Runner.run(agent, "What is the weather in Paris?", max_turns=4)
        streamed = Runner.run_streamed(agent, "What is the weather in Paris?", max_turns=4)
        kinds = {event.type async for event in streamed.stream_events()}
        assert whole.final_output == streamed.final_output, (whole, streamed)
        assert "21" in whole.final_output and "run_item_stream_event" in kinds
        print(model.__name__, repr(whole.final_output))
    words = Agent(name="words", model=OpenAIResponsesModel("manta-demo", client))
    first = await Runner.run(words, "Repeat these words: sea")
    again = await Runner.run(
        words, "Repeat these words: river", previous_response_id=first.last_response_id
    )
    print("previous_response_id", repr(again.final_output))


asyncio.run(main())
