"""pydantic-ai over chat completions, responses and messages."""

import sys

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

url = sys.argv[1]
openai = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
anthropic = AnthropicProvider(base_url=url, api_key="none")
for model in (
    OpenAIChatModel("manta-demo", provider=openai),
    OpenAIResponsesModel("manta-demo", provider=openai),
    AnthropicModel("manta-demo", provider=anthropic),
):
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Get the current weather in a city."""
        return '{"temperature": 21, "condition": "sunny"}'

    result = agent.run_sync("What is the weather in Paris?", model_settings={"temperature": 0})
    assert "21" in result.output, result
    print(type(model).__name__, repr(result.output), result.usage)
